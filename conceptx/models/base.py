"""`wrap` the model you already have, or `load` one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conceptx.models.language import LanguageModel

Model = LanguageModel


def wrap(model: Any, tokenizer: Any = None) -> Model:
    """A thin wrapper around a loaded model; the model itself is used as it is.

    `wrap(lm, tokenizer)` for a causal language model of `transformers`.

    Raises ValueError when it is nothing the library knows, or when the tokenizer is missing.
    """
    if isinstance(model, Model):
        return model
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(f"wrap takes a causal language model of transformers, got {type(model).__name__}.")
    if tokenizer is None:
        raise ValueError("A language model needs its tokenizer: wrap(model, tokenizer).")
    return LanguageModel(model, tokenizer)


def load(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
    """A language model from a local folder, from a hub by its name, or "smollm2" from its installed package.

    dtype: default as in the checkpoint. No code that comes with a checkpoint is ever run.
    Raises FileNotFoundError that says what a name can be, when there is no such folder and the hub does not answer,
    ValueError for a device that is not there.
    """
    _check_device(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conceptx.testbeds import smollm2

    if name == smollm2.NAME:
        model, tokenizer = smollm2.load(dtype or torch.float32)
        return wrap(model.to(device), tokenizer)
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {name}.")
    source = str(folder) if folder.is_dir() else name
    try:
        # said aloud, since transformers asks on the terminal otherwise
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"No model {name!r}: give a local folder, a hub name, or {smollm2.NAME!r} ({reason})"
        ) from None
    return wrap(model.to(device).eval(), tokenizer)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise ValueError(f"The device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
