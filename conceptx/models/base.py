"""`wrap` the model you already have, or `load` one by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch

from conceptx.models.autoregressive import FAMILIES, ARImageModel
from conceptx.models.diffusion import DiffusionModel
from conceptx.models.diffusion_sites import text_encoders
from conceptx.models.language import LanguageModel

ImageModel = DiffusionModel | ARImageModel
Decoder = LanguageModel | ARImageModel  # has the layers and sites of a language model
Model = LanguageModel | ImageModel
INDEX = "model_index.json"  # what makes a folder a pipeline of diffusers


def wrap(model: Any, tokenizer: Any = None) -> Model:
    """A thin wrapper around a loaded model; the model itself is used as it is.

    `wrap(lm, tokenizer)` for a causal language model of `transformers`, `wrap(pipe)` for a text-to-image pipeline of
    `diffusers`, `wrap(janus, processor)` for a model of `transformers` that draws token by token.

    Raises ValueError when it is nothing the library knows, or when the tokenizer is missing.
    """
    if isinstance(model, Model):
        return model
    if hasattr(model, "components") and hasattr(model, "scheduler"):
        return DiffusionModel(model)
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            "wrap takes a causal language model or a Janus model of transformers, or a text-to-image pipeline of "
            f"diffusers, got {type(model).__name__}."
        )
    if model.config.model_type in FAMILIES:
        return ARImageModel(model, tokenizer)
    if tokenizer is None:
        raise ValueError("A language model needs its tokenizer: wrap(model, tokenizer).")
    return LanguageModel(model, tokenizer)


@overload
def load(name: Literal["smollm2"], *, dtype: torch.dtype | None = None, device: str = "cpu") -> LanguageModel: ...
@overload
def load(
    name: Literal["testbed:emoji"], *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DiffusionModel: ...
@overload
def load(name: Literal["testbed:janus"], *, dtype: torch.dtype | None = None, device: str = "cpu") -> ARImageModel: ...
@overload
def load(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Model: ...
def load(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
    """A model from a local folder, from a hub by its name, or a testbed: "smollm2", "testbed:emoji", "testbed:janus".

    A folder or hub name that holds a `model_index.json` is a pipeline of `diffusers`, one whose configuration is that
    of a Janus draws token by token, any other is a language model.
    dtype: default as in the checkpoint for a model of `transformers`, float32 for a pipeline (parts of which would
    otherwise come in different ones). No code that comes with a checkpoint is ever run.
    Raises FileNotFoundError that says what a name can be, when there is no such folder and the hub does not answer,
    ValueError for a device that is not there, and for a `model_index.json` that is broken or names an unknown pipeline.
    """
    _check_device(device)
    from conceptx.testbeds import emoji, janus, smollm2

    if name == smollm2.NAME:
        model, tokenizer = smollm2.load(dtype or torch.float32)
        return wrap(model.to(device), tokenizer)
    if name == emoji.NAME:
        pipeline = emoji.load() if dtype is None else emoji.load().to(dtype=dtype)
        return DiffusionModel(pipeline.to(device), guidance=emoji.GUIDANCE)
    if name == janus.NAME:
        drawer, processor = janus.load(dtype or torch.float32)
        return ARImageModel(drawer.to(device), processor)
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {name}.")
    source = str(folder) if folder.is_dir() else name
    try:
        if (index := pipeline_index(source)) is not None:
            return wrap(pipeline_of(source, index, dtype or torch.float32).to(device))
        return _of_transformers(source, dtype, device)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"No model {name!r}: give a local folder, a hub name, {smollm2.NAME!r}, {emoji.NAME!r} or {janus.NAME!r} "
            f"({reason})"
        ) from None


def _of_transformers(source: str, dtype: torch.dtype | None, device: str) -> Model:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from conceptx.testbeds import janus

    # said aloud, since transformers asks on the terminal otherwise
    if AutoConfig.from_pretrained(source, trust_remote_code=False).model_type in FAMILIES:
        drawer, processor = janus.load(dtype or "auto", source)
        return wrap(drawer.to(device), processor)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return wrap(model.to(device).eval(), tokenizer)


def pipeline_index(source: str) -> dict[str, Any] | None:
    """The components that a `model_index.json` names, or None where there is none. No pipeline code is imported."""
    path = Path(source) / INDEX
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        found = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
        path = Path(found) if found else path
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path} names no pipeline class of diffusers.")
    return index


def pipeline_of(source: str, index: dict[str, Any], dtype: torch.dtype, **parts: Any) -> Any:
    """Without a safety checker, whose black pictures would be taken for erasing.

    parts: components that are there already, by name.
    """
    import diffusers

    if not hasattr(diffusers, name := index["_class_name"]):
        raise ValueError(f"This version of diffusers ({diffusers.__version__}) has no pipeline {name!r}.")
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with _bars_as_transformers():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, trust_remote_code=False, **parts)
    for encoder in text_encoders(pipeline).values():  # transformers keeps the half precision of a file
        encoder.to(dtype)
    return pipeline


@contextmanager
def _bars_as_transformers() -> Iterator[None]:
    """Whoever has silenced the progress bars of transformers does not see those of diffusers either."""
    from diffusers.utils import logging
    from transformers.utils.logging import is_progress_bar_enabled

    if is_progress_bar_enabled() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise ValueError(f"The device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
