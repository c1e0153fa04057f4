"""Dictionaries on disk; the referee is sae-lens itself."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conceptx.dictionaries import load_dictionary, read_texts, save_dictionary, saved_metadata
from conceptx.dictionaries.files import sparse_dictionary
from conceptx.geometry import AffineDictionary, SparseDictionary


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = random(9, 3, 5, 8)


def sparse(activation="relu", centred=True, **options):
    if activation == "jumprelu":
        options["threshold"] = random(4, 20).abs()
    if activation == "topk":
        options["k"] = 4
    return SparseDictionary(
        *(random(0, 8, 20), random(1, 20, 8), random(2, 20), random(3, 8)), activation, centred=centred, **options
    )


def affine():
    return AffineDictionary(random(0, 8, 3), random(1, 3, 8), random(2, 8))


def same(ours, theirs):
    """Up to a millionth of the largest entry."""
    z = ours.encode(X)
    for mine, other in ((z, theirs.encode(X)), (ours.decode(z), theirs.decode(z))):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * float(other.abs().max()))


# -- sae-lens ----------------------------------------------------------------------------------------------------------


def theirs(architecture, **options):
    """A dictionary of sae-lens for training, with weights that are far from where they start."""
    import sae_lens

    names = {
        "standard": "Standard",
        "topk": "TopK",
        "jumprelu": "JumpReLU",
        "batchtopk": "BatchTopK",
        "matryoshka_batchtopk": "MatryoshkaBatchTopK",
        "gated": "Gated",
    }
    config = getattr(sae_lens, f"{names[architecture]}TrainingSAEConfig")(d_in=8, d_sae=20, **options)
    sae = getattr(sae_lens, f"{names[architecture]}TrainingSAE")(config)
    for number, parameter in enumerate(sae.parameters()):
        parameter.data = (
            random(number, *parameter.shape).abs() if parameter.ndim == 1 else random(number, *parameter.shape)
        )
    return sae


KINDS = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 4}),
    ("topk", {"k": 4, "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("batchtopk", {"k": 4}),
    ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [5, 20]}),
]


@pytest.mark.parametrize("architecture,options", KINDS)
def test_what_sae_lens_saves_reads_the_same_here(architecture, options, tmp_path):
    import sae_lens

    theirs(architecture, **options).save_inference_model(tmp_path)
    same(load_dictionary(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


@pytest.mark.parametrize("rescale", [True, False])
def test_a_topk_dictionary_saved_in_training_reads_the_same_here(rescale, tmp_path):
    """Its decoder's norms are not folded yet."""
    sae = theirs("topk", k=4, rescale_acts_by_decoder_norm=rescale)
    sae.save_model(tmp_path)
    same(load_dictionary(tmp_path), sae)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_what_is_saved_here_reads_the_same_in_sae_lens(activation, centred, tmp_path):
    import sae_lens

    ours = sparse(activation, centred)
    save_dictionary(ours, tmp_path, site="layers.1.mlp_output", seed=3)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    same(ours, sae)
    same(load_dictionary(tmp_path), ours)
    assert sae.cfg.metadata.site == "layers.1.mlp_output" and sae.cfg.metadata.seed == 3
    assert saved_metadata(tmp_path)["seed"] == 3


def test_nothing_of_sae_lens_is_needed_for_files(tmp_path):
    save_dictionary(sparse("topk"), tmp_path)
    code = (
        f"import sys; from conceptx.dictionaries import load_dictionary; load_dictionary({str(tmp_path)!r});"
        "print({'sae_lens', 'sklearn', 'transformers', 'pydantic'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


OLD = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False, "hook_point": "x"}


@pytest.mark.parametrize("config,reader", [(OLD, "SAE"), ({"architecture": "jumprelu"}, "JumpReLUTrainingSAE")])
def test_files_from_before_version_6_read_the_same_here(config, reader, tmp_path):
    """TopK was an activation; in training the thresholds of JumpReLU were kept as logarithms."""
    import sae_lens

    weights = {"W_enc": random(0, 8, 20), "W_dec": random(1, 20, 8), "b_enc": random(2, 20), "b_dec": random(3, 8)}
    if config is not OLD:
        weights["log_threshold"] = random(4, 20)
    save_file(weights | {"scaling_factor": torch.ones(20)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 8, "d_sae": 20, "dtype": "float32", **config}))
    same(load_dictionary(tmp_path), getattr(sae_lens, reader).load_from_disk(tmp_path))


def test_gated_dictionaries_are_refused(tmp_path):
    theirs("gated").save_inference_model(tmp_path)
    with pytest.raises(ValueError, match="architecture 'gated' is not supported; standard, jumprelu, topk are"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"normalize_activations": "layer_norm"}, "normalises its inputs .normalize_activations = 'layer_norm'."),
        ({"normalize_activations": True}, "normalises its inputs"),
        ({"finetuning_scaling_factor": True}, "scaling_factor"),
        ({"architecture": "topk"}, "needs a whole number k, got None"),
        ({"architecture": "jumprelu"}, r"lacks the tensors \['threshold'\]; it holds \['W_dec', 'W_enc', 'b_dec'"),
        ({"activation_fn": "tanh-relu"}, "architecture 'tanh-relu' is not supported"),
    ],
)
def test_an_option_that_would_change_the_numbers_is_refused(change, message, tmp_path):
    save_dictionary(sparse(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_dictionary(tmp_path)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 300


# -- our own, Gemma Scope, releases ------------------------------------------------------------------------------------


def test_affine_dictionaries_come_back_with_what_is_known_of_them(tmp_path):
    ours = affine()
    save_dictionary(ours, tmp_path / "new", site="layers.0.output", made="by ica")
    assert saved_metadata(tmp_path / "new") == {"site": "layers.0.output", "made": "by ica"}
    back = load_dictionary(str(tmp_path / "new"))
    assert isinstance(back, AffineDictionary)
    assert all(torch.equal(getattr(back, name), getattr(ours, name)) for name in ("read", "write", "mean"))


def test_a_later_dictionary_replaces_one_of_the_other_kind(tmp_path):
    save_dictionary(sparse(), tmp_path)
    save_dictionary(affine(), tmp_path)
    assert isinstance(load_dictionary(tmp_path), AffineDictionary)
    save_dictionary(sparse("topk"), tmp_path)
    assert load_dictionary(tmp_path).k == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("dictionary", [sparse(), affine()])
def test_an_interrupted_save_leaves_no_mixture(dictionary, tmp_path, monkeypatch):
    from conceptx import store

    save_dictionary(dictionary, tmp_path)

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(store, "save_file", full)
        save_dictionary(sparse("topk"), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no dictionary"):
        load_dictionary(tmp_path)


def gemma_scope(path, names=("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), **more):
    ours = sparse("jumprelu", centred=False)
    arrays = (ours.read, ours.write, ours.read_bias, ours.write_bias, ours.threshold)
    np.savez(path, **{name: tensor.numpy() for name, tensor in zip(names, arrays, strict=False)}, **more)
    return ours


@pytest.mark.parametrize("prefix", ["W", "w"])
def test_gemma_scope_reads_by_file_and_by_folder(prefix, tmp_path):
    names = (f"{prefix}_enc", f"{prefix}_dec", "b_enc", "b_dec", "threshold")
    ours = gemma_scope(tmp_path / "params.npz", names)
    for source in (tmp_path, tmp_path / "params.npz"):
        same(load_dictionary(source), ours)


def test_gemma_scope_is_what_sae_lens_makes_of_it(tmp_path):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    gemma_scope(tmp_path / "params.npz")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=20, apply_b_dec_to_input=False))
    sae.load_state_dict({name: torch.from_numpy(array) for name, array in np.load(tmp_path / "params.npz").items()})
    same(load_dictionary(tmp_path), sae)


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("an array was unpickled",))


def broken(folder):
    """What to load, after something was done to a good folder; with the error and its message."""
    save_dictionary(sparse(), folder / "sae")
    save_dictionary(affine(), folder / "affine")
    weights = folder / "sae" / "sae_weights.safetensors"
    whole, tensors, config = weights.read_bytes(), load_file(weights), (folder / "sae" / "cfg.json")
    gemma_scope(folder / "object.npz", more=np.array([Boom()], dtype=object))
    gemma_scope(folder / "short.npz", ("W_enc", "W_dec"))
    gemma_scope(folder / "cut.npz")
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:200])
    (folder / "text.npz").write_text("no array")

    def with_weights(content):
        weights.write_bytes(content) if isinstance(content, bytes) else save_file(content, weights)
        return folder / "sae"

    def with_json(path, text):
        with_weights(tensors)
        path.write_text(text)
        return path.parent

    index = folder / "affine" / "dictionary.json"
    yield with_weights(whole[:-1]), ValueError, "not a complete safetensors file"
    yield with_weights({"W_enc": tensors["W_enc"]}), ValueError, "lacks the tensors .'W_dec', 'b_enc', 'b_dec'."
    yield with_weights(tensors | {"b_enc": torch.ones(3)}), ValueError, r"read_bias must have shape \(20,\), got \(3,\)"
    yield with_weights(tensors | {"b_dec": torch.full((8,), torch.nan)}), ValueError, "write_bias has 8 NaN"
    yield with_json(config, "{"), ValueError, "cfg.json is not a JSON file"
    yield with_json(config, "[]"), ValueError, "does not hold the settings of a dictionary"
    yield with_json(index, '{"format": "conceptx-dictionary", "version": 2}'), ValueError, "not a dictionary of this"
    config.write_text("{}")
    weights.unlink()
    yield folder / "sae", FileNotFoundError, "There is no file .*sae_weights"
    yield folder, FileNotFoundError, "holds no dictionary: none of cfg.json, dictionary.json and params.npz"
    yield folder / "object.npz", ValueError, "not a complete file of plain arrays"
    yield folder / "cut.npz", ValueError, "not a complete file of plain arrays"
    yield folder / "text.npz", ValueError, "not a complete file of plain arrays"
    yield folder / "short.npz", ValueError, "lacks the tensors .'b_enc', 'b_dec', 'threshold'."
    yield "nowhere", FileNotFoundError, 'give a folder, an .npz file, or "RELEASE:ID"'
    yield ":nothing", FileNotFoundError, "give a folder"


def test_damaged_and_missing_files_are_one_clear_sentence(tmp_path):
    for source, kind, message in broken(tmp_path):
        with pytest.raises(kind, match=message) as caught:
            load_dictionary(source)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source,message",
    [
        ("gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical", "finds no dictionary 'layer_12/width_16k"),
        ("no-such-release:x", "in 'no-such-release': Release no-such-release not found"),
        ("gemma-scope-2b-pt-res-canonical:layer_99", "ID layer_99 not found"),
        ("someone/their-dictionary:layer_1", "finds no dictionary 'layer_1' in 'someone/their-dictionary'"),
    ],
)
def test_a_release_that_does_not_come_is_one_clear_sentence(source, message):
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_dictionary(source)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_release_becomes_a_dictionary(monkeypatch):
    import sae_lens

    sae, asked = theirs("topk", k=4), []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *args, **options: asked.append(args) or sae)
    same(load_dictionary("some-release:layer_3/width_2k"), sae)
    assert asked == [("some-release", "layer_3/width_2k")]


def test_without_sae_lens_a_release_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"pip install 'conceptx\[sae\]'"):
        load_dictionary("some-release:layer_3")


def test_only_dictionaries_and_json_are_saved(tmp_path):
    with pytest.raises(TypeError, match="An affine or a sparse dictionary can be saved, got Tensor"):
        save_dictionary(torch.ones(3), tmp_path)
    for dictionary in (affine(), sparse()):
        with pytest.raises(TypeError):
            save_dictionary(dictionary, tmp_path, made=object())
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="holds no dictionary"):
        saved_metadata(tmp_path)


def test_weights_in_half_precision_are_read_in_float32():
    halves = {name: random(0, *shape).bfloat16() for name, shape in
              {"W_enc": (8, 20), "W_dec": (20, 8), "b_enc": (20,), "b_dec": (8,)}.items()}  # fmt: skip
    assert sparse_dictionary({}, halves).encode(X).dtype == torch.float32


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_are_read_from_jsonl_and_from_plain_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "three", "source": 1}\n')
    (tmp_path / "b.txt").write_text("one\n  two \n\n")
    assert read_texts(tmp_path / "a.jsonl") == ["one\ntwo", "three"]
    assert read_texts(tmp_path / "b.txt") == ["one", "two"]
    captions = read_texts("testbed:emoji")
    assert len(captions) == len(set(captions)) > 6000 and {"a noto dog", "a pet that barks"} <= set(captions)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"title": "y"}\n', "a.jsonl, line 2: expected {.text.: ...}, got .{.title.: .y.}"),
        ("a.jsonl", b'{"text": " "}', "line 1: expected"),
        ("a.jsonl", b"plain", "line 1: expected"),
        ("a.txt", b"\xff\xfe\x00", "not a UTF-8 file"),
        ("a.txt", b"\n \n", "holds no text"),
    ],
)
def test_wrong_text_files_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="There is no text file"):
        read_texts(tmp_path / "other.txt")
