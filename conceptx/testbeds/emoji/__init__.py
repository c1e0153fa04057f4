"""A small Stable Diffusion that draws emoji: 208 objects in four vendors' styles, 32 x 32 pixels, trained from scratch.

`load()` gives an ordinary `StableDiffusionPipeline` in a second, `judges()` the classifiers that say what a picture
shows. `python -m conceptx.testbeds.emoji train` makes all of it anew.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from conceptx.testbeds.emoji.vocabulary import (
    HELD_OUT,
    HELD_OUT_OBJECT,
    OBJECT_NAMES,
    OBJECTS,
    STYLE_NAMES,
    STYLES,
    EmojiObject,
    Style,
    every_caption,
    fill,
    find,
)

if TYPE_CHECKING:
    from torch import Tensor

    from conceptx.testbeds.emoji.judging import Judges

__all__ = [
    "GUIDANCE",
    "HELD_OUT",
    "HELD_OUT_OBJECT",
    "NAME",
    "OBJECTS",
    "OBJECT_NAMES",
    "STEPS",
    "STYLES",
    "STYLE_NAMES",
    "EmojiObject",
    "Style",
    "every_caption",
    "examples",
    "fill",
    "find",
    "folder",
    "judges",
    "load",
]

NAME: Final = "testbed:emoji"
GUIDANCE = 3.0  # at which the bar was measured
STEPS = 20
UNETS = ("a", "b")


def folder() -> Path:
    """Where the weights lie: an ordinary diffusers folder, with the judges beside it."""
    return Path(__file__).parent / "weights"


def load(unet: str = "a", source: Path | None = None) -> Any:
    """The `StableDiffusionPipeline`, in float32 on the CPU.

    unet: "a", which predicts noise, or "b", made from other initial weights and other data to predict velocity; both
    read the same text encoder.
    Raises ValueError for another denoiser, FileNotFoundError when the weights are not there.
    """
    if unet not in UNETS:
        raise ValueError(f"There is no denoiser {unet!r}; available: {', '.join(UNETS)}.")
    from conceptx.progress import quietly

    source = source or folder()
    if not (source / "model_index.json").is_file():
        raise FileNotFoundError(f"There are no weights of the emoji model in {source}.")
    with quietly():
        pipeline = _assembled(source, unet)
    pipeline.text_encoder.float()  # transformers keeps the half precision of the file
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _assembled(source: Path, unet: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from conceptx.testbeds.emoji.networks import build_scheduler

    parts: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if unet == "b":
        parts["unet"] = UNet2DConditionModel.from_pretrained(source / "unet_b", dtype=torch.float32)
        parts["scheduler"] = build_scheduler("v_prediction")
    return StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32, **parts)


@cache
def judges(source: Path | None = None) -> Judges:
    """The classifiers and the small CLIP. They are shared: do not change them."""
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    from conceptx.progress import quietly
    from conceptx.store import load_tensors
    from conceptx.testbeds.emoji.judging import Judges
    from conceptx.testbeds.emoji.networks import ImageEncoder, Judge

    source = source or folder()
    tensors = {name: tensor.float() for name, tensor in load_tensors(source / "judges.safetensors").items()}
    judge, image_encoder = Judge(), ImageEncoder()
    for prefix, module in (("judge.", judge), ("image_encoder.", image_encoder)):
        module.load_state_dict({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
    with quietly():
        text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32)
    for part in (judge, image_encoder, text_encoder):
        part.eval().requires_grad_(False)
    return Judges(judge, image_encoder, text_encoder, CLIPTokenizer.from_pretrained(source / "tokenizer"))


def examples(name: str, source: Path | None = None) -> Tensor:
    """Real drawings of an object that no training saw, one in each style: (4, 3, 32, 32) in [0, 1].

    Raises KeyError that names similar objects.
    """
    from conceptx.store import load_tensors

    every = load_tensors((source or folder()) / "examples.safetensors")["images"]
    return every[OBJECTS.index(find(name))].float() / 255
