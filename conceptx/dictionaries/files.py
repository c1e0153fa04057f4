"""Dictionaries on disk: the folders of sae-lens, Gemma Scope's `params.npz`, and our own affine ones.

Reading and writing need neither sae-lens nor a hub; only a dictionary that is named by its release does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from conceptx.geometry import AffineDictionary, Dictionary, SparseDictionary
from conceptx.store import load_tensors, save_tensors, write_atomically
from conceptx.testbeds import emoji

SPARSE, SPARSE_TENSORS = "cfg.json", "sae_weights.safetensors"  # as sae-lens names them
AFFINE, AFFINE_TENSORS = "dictionary.json", "dictionary.safetensors"
GEMMA_SCOPE = "params.npz"
WEIGHTS = {"W_enc": "read", "W_dec": "write", "b_enc": "read_bias", "b_dec": "write_bias"}
ARCHITECTURES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
SAE_LENS = "6.54.0"  # the version whose format is written
FORMAT = {"format": "conceptx-dictionary", "version": 1, "kind": "affine"}


def load_dictionary(source: str | Path) -> AffineDictionary | SparseDictionary:
    """A dictionary, in float32 on the CPU.

    source: a folder written by `save_dictionary` or by sae-lens (standard, topk or jumprelu; it saves batchtopk and
            matryoshka as jumprelu), a folder with Gemma Scope's `params.npz` or that file itself, or "RELEASE:ID",
            which sae-lens fetches: RELEASE is a name in its list or a hub repository, ID an entry of it.

    Raises FileNotFoundError when there is no such thing, ValueError when a file is damaged or asks for what is not
    supported, ImportError when a release is named and sae-lens is not installed.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return _gemma_scope(path)
    if (path / SPARSE).is_file():
        return sparse_dictionary(_read_json(path / SPARSE), load_tensors(path / SPARSE_TENSORS))
    if (path / AFFINE).is_file():
        return _affine(path)
    if (path / GEMMA_SCOPE).is_file():
        return _gemma_scope(path / GEMMA_SCOPE)
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no dictionary: none of {SPARSE}, {AFFINE} and {GEMMA_SCOPE}.")
    release, colon, name = str(source).partition(":")
    if not (release and colon and name):
        raise FileNotFoundError(f'No dictionary {str(source)!r}: give a folder, an .npz file, or "RELEASE:ID".')
    return _released(release, name)


def save_dictionary(dictionary: Dictionary, folder: str | Path, *, site: str | None = None, **metadata: Any) -> None:
    """Write the dictionary in float32, with what is to be known of it (as JSON).

    A sparse one becomes a folder that `sae_lens.SAE.load_from_disk` reads as well. The JSON file goes first and comes
    last, so that an interrupted save leaves no mixture of two dictionaries.
    Raises TypeError for another kind of dictionary and for metadata that is not JSON; then nothing is written.
    """
    folder = Path(folder)
    known = {"site": site, **metadata} if site is not None else metadata
    if isinstance(dictionary, SparseDictionary):
        _write(folder, SPARSE, _config(dictionary, known), SPARSE_TENSORS, _weights(dictionary))
    elif isinstance(dictionary, AffineDictionary):
        tensors = {name: getattr(dictionary, name) for name in ("read", "write", "mean")}
        _write(folder, AFFINE, FORMAT | {"metadata": known}, AFFINE_TENSORS, tensors)
    else:
        raise TypeError(f"An affine or a sparse dictionary can be saved, got {type(dictionary).__name__}.")


def saved_metadata(folder: str | Path) -> dict[str, Any]:
    """What `save_dictionary` or sae-lens wrote beside the tensors: the site, how it was trained and so on.

    Raises FileNotFoundError when the folder holds no dictionary with metadata, ValueError when its file is damaged.
    """
    for name in (SPARSE, AFFINE):
        if (path := Path(folder) / name).is_file():
            return dict(_read_json(path).get("metadata") or {})
    raise FileNotFoundError(f"{folder} holds no dictionary: neither {SPARSE} nor {AFFINE}.")


def read_texts(path: str | Path) -> list[str]:
    """The texts in a file: {"text": ...} a line if its name ends in .jsonl, else a text a line. Blank lines are none.

    "testbed:emoji" names the captions that the emoji model was trained on.
    Raises FileNotFoundError when it is missing, ValueError when a line is wrong or no text is there.
    """
    if str(path) == emoji.NAME:
        return list(dict.fromkeys(emoji.every_caption()))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no text file {path}.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 file: {error}.") from None
    read = _text_of if path.suffix == ".jsonl" else lambda line, *_: line.strip()
    texts = [read(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{path}, line {number}: expected {{"text": ...}}, got {line.strip()[:60]!r}.')
    return text


# -- sparse ones -------------------------------------------------------------------------------------------------------


def sparse_dictionary(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseDictionary:
    """What the configuration and weights of sae-lens, also of versions before 6, describe.

    Raises ValueError that names an option which would change the numbers and is not supported.
    """
    activation = ARCHITECTURES[_architecture(config)]
    _refuse_unsupported(config, tensors)
    needed = [*WEIGHTS, *["threshold"] * (activation == "jumprelu")]
    here = {name: tensor.float().cpu() for name, tensor in _modern(tensors).items()}
    if missing := [name for name in needed if name not in here]:
        raise ValueError(f"The dictionary lacks the tensors {missing}; it holds {sorted(here)}.")
    if config.get("rescale_acts_by_decoder_norm"):  # z |W_dec| is what is compared and kept: the same as unit W_dec
        norms = here["W_dec"].norm(dim=1).clamp(min=1e-8)
        here["W_enc"], here["b_enc"] = here["W_enc"] * norms, here["b_enc"] * norms
        here["W_dec"] = here["W_dec"] / norms[:, None]
    return SparseDictionary(
        **{ours: here[theirs] for theirs, ours in WEIGHTS.items()},
        activation=activation,
        threshold=here["threshold"] if activation == "jumprelu" else None,
        k=_k(config) if activation == "topk" else None,
        centred=bool(config.get("apply_b_dec_to_input", True)),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    """Before version 6 TopK was an activation of the standard architecture."""
    name = config.get("architecture", "standard")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if name == "standard" and function != "relu":
        name = function
    if name not in ARCHITECTURES:
        raise ValueError(
            f"The dictionary's architecture {name!r} is not supported; {', '.join(ARCHITECTURES)} are "
            "(sae-lens saves batchtopk and matryoshka for use as jumprelu)."
        )
    return name


def _k(config: Mapping[str, Any]) -> int:
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int):
        raise ValueError(f"A topk dictionary needs a whole number k, got {k!r}.")
    return k


def _refuse_unsupported(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if (normalised := config.get("normalize_activations")) not in (None, False, "none"):
        raise ValueError(
            f"The dictionary normalises its inputs (normalize_activations = {normalised!r}), which is not supported; "
            "fold the factor into its weights first."
        )
    factor = tensors.get("scaling_factor")
    if config.get("finetuning_scaling_factor") or (factor is not None and not bool((factor == 1).all())):
        raise ValueError("The dictionary scales its features after encoding (scaling_factor), which is not supported.")


def _modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as sae-lens has them now."""
    named = {f"W{name[1:]}" if name in ("w_enc", "w_dec") else name: tensor for name, tensor in tensors.items()}
    if "log_threshold" in named:
        named["threshold"] = named.pop("log_threshold").exp()
    return named


def _config(dictionary: SparseDictionary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {activation: architecture for architecture, activation in ARCHITECTURES.items()}
    return {
        "architecture": names[dictionary.activation],
        "d_in": dictionary.dim,
        "d_sae": dictionary.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS, **metadata},
        **({} if dictionary.k is None else {"k": dictionary.k, "rescale_acts_by_decoder_norm": False}),
    }


def _weights(dictionary: SparseDictionary) -> dict[str, Tensor]:
    tensors = {theirs: getattr(dictionary, ours) for theirs, ours in WEIGHTS.items()}
    return tensors if dictionary.threshold is None else {**tensors, "threshold": dictionary.threshold}


def _gemma_scope(path: Path) -> SparseDictionary:
    """JumpReLU without centring, as Gemma Scope's report has it (Lieberum et al. 2024, arXiv 2408.05147)."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    except (BadZipFile, ValueError, OSError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete file of plain arrays: {str(error).rstrip('.')}.") from None
    return sparse_dictionary({"architecture": "jumprelu", "apply_b_dec_to_input": False}, tensors)


def _released(release: str, name: str) -> SparseDictionary:
    sae_lens = imported_sae_lens()
    try:
        sae = sae_lens.SAE.from_pretrained(release, name, device="cpu")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150].rstrip(".")
        raise FileNotFoundError(f"sae-lens finds no dictionary {name!r} in {release!r}: {reason}.") from None
    return sparse_dictionary(sae.cfg.to_dict(), sae.state_dict())


def imported_sae_lens() -> Any:
    """The package. Raises ImportError that says how to get it."""
    try:
        import sae_lens
    except ModuleNotFoundError:
        raise ImportError("This needs sae-lens: pip install 'conceptx[sae]'.") from None
    return sae_lens


# -- files -------------------------------------------------------------------------------------------------------------


def _affine(folder: Path) -> AffineDictionary:
    index = _read_json(folder / AFFINE)
    if {key: index.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{folder / AFFINE} is not a dictionary of this version.")
    names = ("read", "write", "mean")
    tensors = load_tensors(folder / AFFINE_TENSORS, expected=names)
    return AffineDictionary(*(tensors[name] for name in names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold the settings of a dictionary.")
    return content


def _write(folder: Path, index: str, content: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    for old in {SPARSE, AFFINE, SPARSE_TENSORS, AFFINE_TENSORS} - {weights}:
        (folder / old).unlink(missing_ok=True)
    save_tensors(folder / weights, {name: tensor.float() for name, tensor in tensors.items()})
    write_atomically(folder / index, lambda temporary: temporary.write_text(text, encoding="utf-8"))
