"""Folding on the disk gives, bit for bit, what loading, folding and saving gives; or it gives nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosts import host, said, tiny, tiny_pipeline
from safetensors.torch import load_file, save_file

from conceptx.concept import Concept
from conceptx.edit import Columns, Dense, Edit, LowRank, Rows
from conceptx.geometry import Subspace
from conceptx.methods import UCE
from conceptx.models import checkpoints, load
from conceptx.models.checkpoints import fold_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TIN = Concept("tin", kind="object", anchor="gold", retain=["iron"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def removal(d, rank=1, seed=0, mean=False):
    at = normal(d, seed=seed + 100) if mean else torch.zeros(d)
    return Subspace.orthogonal(normal(d, rank, seed=seed).double(), at.double()).removal()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by component and key, whatever file it is in."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        f"{path.parent.name if path.parent != folder else ''}/{k}": t
        for path in files
        for k, t in load_file(path).items()
    }


def same_tensors(first: Path, second: Path) -> bool:
    a, b = stored(first), stored(second)
    return a.keys() == b.keys() and all(t.dtype == b[k].dtype and torch.equal(t, b[k]) for k, t in a.items())


def saved(model, folder: Path, **options) -> Path:
    if hasattr(model, "pipeline"):
        model.pipeline.save_pretrained(folder, **options)
    else:
        model.module.save_pretrained(folder, **options)
        model.tokenizer.save_pretrained(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def lm_edit(model, mean=False) -> Edit:
    """Maps in chains and alone, and every kind of weight change, also of weights that take in a map."""
    attention, mlp = model.written(1)
    out, inside = model.parameter_shape(mlp)
    d = model.width("layers.0.output")
    reader = f"{model.readers('layers.2.attention_input')[0]}.weight"
    embedding = next(name for name, _ in model.module.named_parameters())
    return Edit(
        model.fingerprint,
        maps={
            "layers.0.attention_input": (removal(d, 1, mean=mean),),
            "layers.2.attention_input": (removal(d, 2), removal(d, 1, seed=5, mean=mean)),
            "layers.0.mlp_hidden": (removal(inside, 3),),
        },
        deltas={
            embedding: Rows(torch.tensor([3, 9]), normal(2, d)),
            mlp: Columns(torch.tensor([1, 30]), normal(out, 2)),
            attention: LowRank(normal(out, 2), normal(2, out)),
            reader: Dense(normal(*model.parameter_shape(reader))),
        },
    )


# -- the theorem -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,shards,dtype",
    [
        ("llama", None, torch.float32),
        ("llama", "15KB", torch.bfloat16),
        ("llama_tied", None, torch.bfloat16),
        ("llama_tied", "15KB", torch.float32),
        ("gpt2", None, torch.float32),
        ("gpt2", "15KB", torch.float16),
        ("phi3", "15KB", torch.float32),
    ],
)
def test_a_language_model_on_the_disk_is_the_one_in_memory(tmp_path, kind, shards, dtype):
    model = tiny(kind, dtype)
    folder = saved(model, tmp_path / "model", **({"max_shard_size": shards} if shards else {}))
    assert ((folder / "model.safetensors.index.json").is_file()) == (shards is not None)
    before, edit = stored(folder), lm_edit(load(str(folder)))
    load(str(folder)).save_pretrained(tmp_path / "memory", edit)
    done = fold_checkpoint(folder, edit, tmp_path / "disk")
    assert same_tensors(tmp_path / "disk", tmp_path / "memory")
    assert names(tmp_path / "disk") == names(folder)
    changed = [key for key, tensor in stored(tmp_path / "disk").items() if not torch.equal(tensor, before[key])]
    assert (done.weights, done.tensors) == (len(changed), len(before))
    assert done.size == sum(path.stat().st_size for path in (tmp_path / "disk").iterdir())


@pytest.mark.parametrize("shards", [None, "15KB"], ids=["one file", "sharded"])
def test_biases_that_folding_needs_are_added(tmp_path, shards):
    folder = saved(tiny("llama"), tmp_path / "model", **({"max_shard_size": shards} if shards else {}))
    edit = lm_edit(load(str(folder)), mean=True)
    load(str(folder)).save_pretrained(tmp_path / "memory", edit)
    done = fold_checkpoint(folder, edit, tmp_path / "disk")
    assert same_tensors(tmp_path / "disk", tmp_path / "memory")
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["attention_bias"] is True
    assert done.tensors == len(stored(folder)) + 4 * 3  # with zeros where none was needed
    if shards:
        index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
        assert {f"/{key}" for key in index["weight_map"]} == stored(tmp_path / "disk").keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(tmp_path / "disk").values())
    assert torch.equal(said(load(str(tmp_path / "disk"))), said(load(str(tmp_path / "memory"))))


def pipeline_edit(model) -> Edit:
    """What UCE makes, and dense changes of a text encoder and of a weight that takes in the map."""
    reader, inside = f"{model.projections[0]}.weight", next(n for n in model.module if n.startswith("text_encoder"))
    dense = [reader, next(n for n, p in model.module.named_parameters() if n.startswith(inside) and p.ndim == 2)]
    return UCE().erase(model, TIN) + Edit(
        model.fingerprint, deltas={name: Dense(normal(*model.parameter_shape(name))) for name in dense}
    )


@pytest.mark.parametrize(
    "kind,shards,dtype",
    [
        ("sd1", None, torch.float32),
        ("sd1", "40KB", torch.float16),
        ("sdxl", "40KB", torch.float32),
        ("sd3", None, torch.float16),
        ("sd3", "40KB", torch.float32),
        ("flux", None, torch.float32),
    ],
)
def test_a_pipeline_on_the_disk_is_the_one_in_memory(tmp_path, kind, shards, dtype):
    options = {"max_shard_size": shards} if shards else {}
    folder = saved(host(kind, dtype), tmp_path / "pipe", **options)
    edit = pipeline_edit(load(str(folder), dtype=dtype))
    load(str(folder), dtype=dtype).save_pretrained(tmp_path / "memory", edit)
    done = fold_checkpoint(folder, edit, tmp_path / "disk")
    assert same_tensors(tmp_path / "disk", tmp_path / "memory")
    assert names(tmp_path / "disk") == names(folder)
    assert done.weights == len(edit.fold(load(str(folder), dtype=dtype)).deltas)


def test_files_of_a_variant_are_changed_and_found_by_plain_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = saved(host("sd1", torch.float16), tmp_path / "pipe", variant="fp16", max_shard_size="40KB")
    assert list((folder / "unet").glob("*.safetensors.index.fp16.json"))
    options = {"dtype": torch.float16, "variant": "fp16", "safety_checker": None}
    model = load(str(saved(host("sd1", torch.float16), tmp_path / "plain")), dtype=torch.float16)
    edit = UCE().erase(model, TIN)
    fold_checkpoint(folder, edit, tmp_path / "disk")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "disk", **options)
    with edit.fold(model).applied(model):
        wanted = {name: p.clone() for name, p in model.denoiser.named_parameters()}
    assert all(torch.equal(p, wanted[name]) for name, p in plain.unet.named_parameters())


def test_plain_transformers_loads_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    edit = lm_edit(model)
    fold_checkpoint(saved(model, tmp_path / "model"), edit, tmp_path / "disk")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    with edit.fold(model).applied(model):
        wanted = {name: p.clone() for name, p in model.module.named_parameters()}
    assert all(torch.equal(p, wanted[name]) for name, p in plain.named_parameters())


# -- names and copies in older checkpoints -----------------------------------------------------------------------------


def renamed(path: Path, change) -> None:
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_keys_of_a_base_model_and_of_an_older_text_encoder(tmp_path):
    gpt2, pipe = saved(tiny("gpt2"), tmp_path / "gpt2"), saved(tiny_pipeline("sd1"), tmp_path / "pipe")
    renamed(gpt2 / "model.safetensors", lambda key: key.removeprefix("transformer."))
    renamed(pipe / "text_encoder" / "model.safetensors", lambda key: f"text_model.{key}")
    for folder, made in ((gpt2, lm_edit), (pipe, pipeline_edit)):
        model, out = load(str(folder)), tmp_path / f"{folder.name}-out"
        edit = made(model)
        fold_checkpoint(folder, edit, out)
        assert stored(out).keys() == stored(folder).keys()
        with edit.fold(model).applied(model):
            wanted = dict(model.module.state_dict())
            assert all(torch.equal(t, wanted[name]) for name, t in load(str(out)).module.state_dict().items())


def test_a_tied_weight_that_is_stored_twice_changes_twice(tmp_path):
    model = tiny("llama_tied")
    folder = saved(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit = Edit(model.fingerprint, deltas={"lm_head.weight": Rows(torch.tensor([3]), normal(1, 32))})
    assert fold_checkpoint(folder, edit, tmp_path / "out").weights == 2
    found = stored(tmp_path / "out")
    assert torch.equal(found["/lm_head.weight"], found["/model.embed_tokens.weight"])
    assert not torch.equal(found["/lm_head.weight"], tensors["lm_head.weight"])


# -- absent or whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["_change", "_copy", "_rewrite"])
def test_an_interrupted_fold_leaves_no_folder_and_the_next_one_succeeds(tmp_path, monkeypatch, step):
    folder = saved(tiny("llama"), tmp_path / "model", max_shard_size="15KB")
    edit, there = lm_edit(tiny("llama"), mean=True), names(tmp_path)
    real, calls = getattr(checkpoints, step), []

    def stopped(*arguments):
        real(*arguments)
        calls.append(step)
        if len(calls) == (3 if step == "_change" else 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, step, stopped)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(folder, edit, tmp_path / "out")
    assert names(tmp_path) == there and {p.name for p in tmp_path.iterdir()} == {"model"}
    monkeypatch.undo()
    fold_checkpoint(folder, edit, tmp_path / "out")
    load(str(folder)).save_pretrained(tmp_path / "memory", edit)
    assert same_tensors(tmp_path / "out", tmp_path / "memory")


def test_an_interrupted_fold_leaves_the_folder_that_was_there(tmp_path, monkeypatch):
    model = tiny("llama")
    folder, edit = saved(model, tmp_path / "model"), lm_edit(model)
    fold_checkpoint(folder, edit, tmp_path / "out")
    before = stored(tmp_path / "out")
    monkeypatch.setattr(checkpoints, "_change", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        fold_checkpoint(folder, edit * 0.5, tmp_path / "out")
    assert all(torch.equal(t, before[key]) for key, t in stored(tmp_path / "out").items())
    monkeypatch.undo()
    fold_checkpoint(folder, edit * 0.5, tmp_path / "out")  # files of the same names may be replaced
    assert not all(torch.equal(t, before[key]) for key, t in stored(tmp_path / "out").items())


def test_the_checkpoint_stays_and_other_files_come_along_but_hidden_folders(tmp_path):
    folder = saved(tiny("llama"), tmp_path / "model")
    (folder / ".git").mkdir()
    (folder / ".git" / "objects").write_bytes(b"the weights, unedited")
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").symlink_to(folder / "README.md")
    (folder / "training_args.bin").write_bytes(b"pickle")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fold_checkpoint(folder, lm_edit(tiny("llama")), tmp_path / "out")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert names(tmp_path / "out") == {name for name in names(folder) if not name.startswith(".git")}
    assert (tmp_path / "out" / "notes" / "a.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "notes" / "a.txt").is_symlink()


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, edit: Edit, out: Path, match: str) -> None:
    """In one sentence, with nothing written."""
    there = sorted(str(path) for path in folder.parent.rglob("*"))
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=match) as caught:
        fold_checkpoint(folder, edit, out)
    sentence = str(caught.value.args[0])
    assert sentence.endswith(".") and len(sentence.replace(str(folder.parent), "")) < 300
    assert sorted(str(path) for path in folder.parent.rglob("*")) == there


def lm_only(maps=(), **more):
    model = tiny("llama")
    return Edit(model.fingerprint, maps=dict(maps), **more)


UNFIT = {
    "a gate": (
        lm_only({"layers.0.mlp_input": (replace(removal(32), gate="relu"),)}),
        "maps at .*layers.0.mlp_input.* cannot be folded",
    ),
    "no reader": (lm_only({"layers.0.output": (removal(32),)}), "maps at .*layers.0.output.* cannot be folded"),
    "generation": (lm_only(generation={"top_k": 5}), r"generation arguments \['top_k'\] cannot be folded"),
    "another model": (Edit(tiny("llama", seed=1).fingerprint), "made for another model: .* sampled weights differ"),
    "another kind": (Edit(tiny("gpt2").fingerprint), "made for another model: its architecture or parameter shapes"),
    "a pipeline": (Edit(tiny_pipeline().fingerprint), "made for another model: it has no unet"),
    "a shape": (lm_only(deltas={"lm_head.weight": Dense(torch.zeros(3, 3))}), "does not fit its shape"),
    "a name": (lm_only(deltas={"lm_heat.weight": Dense(torch.zeros(3, 3))}), "similar: lm_head.weight"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_edit_that_does_not_fit_is_refused(tmp_path, case):
    edit, match = UNFIT[case]
    refused(saved(tiny("llama"), tmp_path / "model"), edit, tmp_path / "out", match)


@pytest.mark.parametrize(
    "kind,match", [("mistral", "no place for the bias model.layers"), ("sd1", "no place for the bias")]
)
def test_a_bias_without_a_place_is_refused_as_in_memory(tmp_path, kind, match):
    model = host(kind)
    site = "text" if kind == "sd1" else "layers.0.mlp_input"
    edit = Edit(model.fingerprint, maps={site: (removal(model.width(site), mean=True),)})
    folder = saved(model, tmp_path / "model")
    refused(folder, edit, tmp_path / "out", match)
    with pytest.raises(ValueError, match=match):
        model.save_pretrained(tmp_path / "memory", edit)


def _pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")


def _two_sets(folder):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


def _stray(folder):
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original" / "model.safetensors")


def _link(folder):
    (folder.parent / "elsewhere").write_text("secret")
    (folder / "readme").symlink_to(folder.parent / "elsewhere")


def _folder_link(folder):
    (folder / "self").symlink_to(folder)


def _cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")


def _misshapen(folder):
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _no_shard(folder):
    _index(folder, {"model.norm.weight": "model-00002.safetensors"})


def _outside(folder):
    _index(folder, {"model.norm.weight": "../model.safetensors"})


def _index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _unknown(folder):
    (folder / "config.json").write_text('{"model_type": "mamba"}')


def _no_type(folder):
    (folder / "config.json").write_text("{}")


def _broken(folder):
    (folder / "config.json").write_text("{")


def _no_config(folder):
    (folder / "config.json").unlink()


def _quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )


SPOILED = {
    _pickled: "pytorch_model.bin is not safetensors and would stay unedited",
    _two_sets: "more than one set of weights",
    _stray: "would stay unedited",
    _link: "link out of the folder",
    _folder_link: "link out of the folder or to a folder",
    _cut_off: "may have been cut off",
    _lacking: "lack the weight model.norm.weight",
    _misshapen: r"model.norm.weight in .* has the shape \[3\], not \[32\]",
    _no_weights: "holds no weights in safetensors",
    _no_shard: "lacks model-00002.safetensors",
    _outside: "lacks model.safetensors, which its index names",
    _unknown: "Unknown language-model architecture 'mamba'",
    _no_type: "names no model type",
    _broken: "config.json is not a JSON file",
    _no_config: "holds no model",
    _quantised: "quantised",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda function: function.__name__)
def test_a_folder_that_is_no_whole_model_is_refused(tmp_path, spoil):
    folder = saved(tiny("llama"), tmp_path / "model")
    spoil(folder)
    refused(folder, lm_only(), tmp_path / "out", SPOILED[spoil])


def test_weights_beside_the_components_of_a_pipeline_are_refused(tmp_path):
    folder = saved(tiny_pipeline("sd1"), tmp_path / "pipe")
    save_file({"a": torch.zeros(1)}, folder / "v1-5.safetensors")
    refused(
        folder, Edit(tiny_pipeline("sd1").fingerprint), tmp_path / "out", "v1-5.safetensors belongs to no component"
    )


def test_a_target_that_would_be_lost_is_refused(tmp_path, monkeypatch):
    folder = saved(tiny("llama"), tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    cases = {
        "mine": r"holds other files \(thesis.tex\)",
        "file": "is a file",
        "model": "the checkpoint itself",
        "model/inside": "the checkpoint itself or lies in it",
        ".": "holds other files",
    }
    for name, match in cases.items():
        refused(folder, lm_only(), tmp_path / name, match)
    refused(tmp_path / "nothing", lm_only(), tmp_path / "out", "There is no model folder")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    refused(folder, lm_only(), tmp_path / "out", "needs .* bytes beside .*, 5 are free")


def test_no_weight_is_read_into_memory_for_knowing_the_model(tmp_path):
    """The fingerprint on the disk is the one in memory, and all parameters of the skeleton are without storage."""
    from conceptx.models.on_disk import on_disk

    for kind in ("llama_tied", "gpt2", "sdxl"):
        model = host(kind)
        found = on_disk(saved(model, tmp_path / kind))
        assert model.fingerprint.mismatch(found.fingerprint) is None
        assert model.fingerprint.digest() == found.fingerprint.digest()
        assert {p.device.type for p in found.module.parameters()} == {"meta"}
        for name, _ in model.module.named_parameters():
            assert torch.equal(found.parameter(name), model.parameter(name))


def test_where_in_memory_a_weight_lies_changes_nothing():
    """A file that is mapped has its tensors at any address, and the last bit of a product depends on it."""
    model = tiny("llama")
    edit = Edit(model.fingerprint, maps={"layers.0.mlp_hidden": (removal(48),), "layers.1.mlp_input": (removal(32),)})
    wanted = edit.fold(model).deltas
    for parameter in model.module.parameters():
        elsewhere = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
        parameter.data = elsewhere.copy_(parameter.data)
    for name, found in edit.fold(model).deltas.items():
        assert torch.equal(found.up, wanted[name].up) and torch.equal(found.down, wanted[name].down)
