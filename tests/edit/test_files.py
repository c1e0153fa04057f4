"""An edit on disk: whole or not at all, safetensors and JSON only."""

import json
from pathlib import Path

import pytest
import torch
from hosts import logits, tiny, tiny_pipeline

from conceptx import store
from conceptx.edit import Columns, Dense, Edit, LowRank, Rows
from conceptx.geometry import ConceptMap, Subspace


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_edit(model, seed=0):
    return Edit(
        model.fingerprint,
        maps={
            "layers.1.mlp_input": (
                Subspace.orthogonal(normal(32, 2, seed=seed), normal(32, seed=1)).removal(),
                ConceptMap(normal(32, 1), normal(1, 32, seed=1), normal(32, seed=2), "relu"),
            )
        },
        deltas={
            "model.layers.0.mlp.up_proj.weight": LowRank(normal(48, 2, seed=seed), normal(2, 32)),
            "model.layers.1.self_attn.q_proj.bias": Dense(normal(32).bfloat16()),
            "model.embed_tokens.weight": Rows(torch.tensor([7, 40]), normal(2, 32).float()),
            "model.layers.1.mlp.down_proj.weight": Columns(torch.tensor([5]), normal(32, 1).float()),
        },
        generation={"top_k": 5},
        provenance=({"method": "test", "seed": seed, "settings": {"layers": (1, 2)}},),
    )


def says(model, edit):
    with edit.applied(model):
        return logits(model)


def test_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    model = tiny()
    edit = an_edit(model)
    edit.save(tmp_path / "deep" / "edit")
    loaded = Edit.load(tmp_path / "deep" / "edit")
    assert torch.equal(says(model, edit), says(model, loaded))
    assert loaded.generation == edit.generation
    assert loaded.provenance == ({"method": "test", "seed": 0, "settings": {"layers": [1, 2]}},)
    assert loaded.maps["layers.1.mlp_input"][1].gate == "relu"
    for name, delta in edit.deltas.items():
        for part, tensor in delta.tensors().items():
            again = loaded.deltas[name].tensors()[part]
            assert again.dtype == tensor.dtype and torch.equal(again, tensor)


def test_the_folder_holds_one_json_and_one_safetensors_also_after_a_second_save(tmp_path):
    model = tiny()
    for seed in (0, 1, 1):
        an_edit(model, seed).save(tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert torch.equal(says(model, Edit.load(tmp_path)), says(model, an_edit(model, 1)))


def test_tensors_of_odd_strides_are_saved(tmp_path):
    """A transposed row is contiguous for PyTorch, yet its last stride is not one; nor is that of a corner."""
    model, name = tiny(), "model.layers.0.mlp.up_proj.weight"
    for up in (normal(1, 48).T, normal(48, 2)[:, 1:]):
        edit = Edit(model.fingerprint, deltas={name: LowRank(up, normal(1, 32))})
        edit.save(tmp_path)
        assert torch.equal(says(model, Edit.load(tmp_path)), says(model, edit))
        assert store.digest({"up": up}) == store.digest({"up": up.clone(memory_format=torch.contiguous_format)})
    corner = Dense(normal(6, 6).T[:1, :1])
    Edit(model.fingerprint, deltas={"a.weight": corner}).save(tmp_path)
    assert torch.equal(Edit.load(tmp_path).deltas["a.weight"].change, corner.change)


def broken(*_args, **_kwargs):
    raise OSError("no space left on device")


def half_written(tensors, path, _metadata):
    Path(path).write_bytes(b"\x10")
    broken()


@pytest.mark.parametrize("moment", ["while tensors are written", "before the index", "while the index is renamed"])
def test_an_interrupted_save_leaves_the_old_edit(moment, tmp_path, monkeypatch):
    model = tiny()
    an_edit(model, 0).save(tmp_path)
    old = Edit.load(tmp_path)
    if moment == "while tensors are written":
        monkeypatch.setattr(store, "save_file", half_written)
    elif moment == "before the index":
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: broken())
    else:
        rename = Path.replace
        monkeypatch.setattr(Path, "replace", lambda a, b: broken() if "edit.json" in str(b) else rename(a, b))
    with pytest.raises(OSError, match="no space left"):
        an_edit(model, 1).save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(says(model, Edit.load(tmp_path)), says(model, old))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    an_edit(model, 1).save(tmp_path)  # and the next save clears up
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with store.replaced_folder(folder) as temporary:
            (temporary / "a").write_text(content)
    assert (folder / "a").read_text() == "new" and [*tmp_path.iterdir()] == [folder]
    with pytest.raises(ZeroDivisionError), store.replaced_folder(folder) as temporary:
        (temporary / "a").write_text("newer")
        raise ZeroDivisionError
    assert (folder / "a").read_text() == "new" and [*tmp_path.iterdir()] == [folder]
    rename = Path.rename

    def no_second(path, target):
        return broken() if target == folder and (path / "b").exists() else rename(path, target)

    monkeypatch.setattr(Path, "rename", no_second)
    with pytest.raises(OSError, match="no space left"), store.replaced_folder(folder) as temporary:
        (temporary / "a").write_text("newest")
        (temporary / "b").write_text("newest")
    assert (folder / "a").read_text() == "new" and [*tmp_path.iterdir()] == [folder]


def test_a_truncated_tensor_file_is_one_clear_error(tmp_path):
    an_edit(tiny()).save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"not a complete safetensors file .* may have been cut off"):
            Edit.load(tmp_path)
    path.write_bytes(whole)
    Edit.load(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "sub/x.safetensors", "/etc/passwd", "", "."])
def test_an_index_that_names_another_folder_is_refused(name, tmp_path):
    folder = tmp_path / "edit"
    an_edit(tiny()).save(folder)
    (tensors,) = folder.glob("*.safetensors")
    (tmp_path / "other.safetensors").write_bytes(tensors.read_bytes())
    index = json.loads((folder / "edit.json").read_text())
    (folder / "edit.json").write_text(json.dumps(index | {"tensors": name}))
    with pytest.raises(ValueError, match="lies outside its folder"):
        Edit.load(folder)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"version": 3}, "not an edit of this version: version"),
        ({"format": "other"}, "not an edit of this version: format"),
        ({"surplus": 1}, "not an edit of this version: surplus"),
        ({"deltas": {"a.weight": "dense"}}, "does not hold what edit.json says"),
        ({"deltas": {"model.embed_tokens.weight": "magic"}}, "does not hold what edit.json says"),
        ({"deltas": {"model.embed_tokens.weight": "low_rank"}}, "does not hold what edit.json says"),
        ({"maps": {"layers.1.mlp_input": ["identity"] * 3}}, "does not hold what edit.json says"),
        ({"maps": {"layers.1.mlp_input": ["step"]}}, "Unknown gate 'step'"),
    ],
)
def test_an_index_that_does_not_fit_its_tensors_is_one_clear_error(change, message, tmp_path):
    an_edit(tiny()).save(tmp_path)
    index = json.loads((tmp_path / "edit.json").read_text())
    (tmp_path / "edit.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        Edit.load(tmp_path)


def test_a_compact_edit_is_a_smaller_file_that_does_the_same(tmp_path):
    model = tiny_pipeline("sd1")
    write, read = normal(32, 40).double(), normal(40, 32).double()
    edit = Edit(model.text_fingerprint, maps={"text": (ConceptMap(write, read, torch.zeros(32).double()),)})
    for name, each in (("plain", edit), ("compact", edit.compact())):
        each.save(tmp_path / name)
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("plain", "compact")]
    assert sizes[1] < 0.6 * sizes[0]
    x = normal(5, 32).double()
    torch.testing.assert_close(
        Edit.load(tmp_path / "compact").maps["text"][0](x), edit.maps["text"][0](x), rtol=1e-5, atol=1e-4
    )
