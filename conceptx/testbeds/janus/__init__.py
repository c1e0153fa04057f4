"""A small Janus that draws emoji: 64 objects in four styles, 64 tokens a picture of 32 x 32, trained from scratch.

`load()` gives an ordinary `JanusForConditionalGeneration` and its processor in a second. Its judges are those of the
emoji testbed. `python -m conceptx.testbeds.janus train` makes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from conceptx.testbeds.emoji.vocabulary import STYLE_NAMES
from conceptx.testbeds.janus.vocabulary import NUMBERS, OBJECT_NAMES, OBJECTS

__all__ = ["GUIDANCE", "NAME", "NUMBERS", "OBJECTS", "OBJECT_NAMES", "STYLE_NAMES", "TEMPERATURE", "folder", "load"]

NAME: Final = "testbed:janus"
GUIDANCE, TEMPERATURE = 1.5, 0.5  # at which the bar was measured; those of its generation configuration


def folder() -> Path:
    """Where the weights lie: an ordinary folder of transformers."""
    return Path(__file__).parent / "weights"


def load(dtype: Any = None, source: str | Path | None = None) -> tuple[Any, Any]:
    """(`JanusForConditionalGeneration`, `JanusProcessor`) on the CPU, in float32 unless a dtype is given.

    source: another folder or hub name.  Raises FileNotFoundError when the weights are not there.
    """
    import torch
    from transformers import JanusForConditionalGeneration, JanusProcessor

    from conceptx.progress import quietly

    if source is None and not (folder() / "config.json").is_file():
        raise FileNotFoundError(f"There are no weights of the small Janus in {folder()}.")
    place = source or folder()
    with quietly():  # without torchvision there are notices
        model = JanusForConditionalGeneration.from_pretrained(place, dtype=dtype or torch.float32)
        return model.eval(), JanusProcessor.from_pretrained(place)
