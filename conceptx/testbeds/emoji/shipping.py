"""From trained parts to the folder that ships, and the measurements that say whether it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conceptx.progress import track
from conceptx.store import save_tensors, write_atomically
from conceptx.testbeds.emoji import UNETS, judges, load
from conceptx.testbeds.emoji.drawings import Variation, contact_sheet, pictures, save_png
from conceptx.testbeds.emoji.networks import build_scheduler
from conceptx.testbeds.emoji.training import HARD, SEEN, Workshop
from conceptx.testbeds.emoji.vocabulary import BOTH, OBJECT_NAMES, OBJECTS, STYLE_NAMES, STYLES, fill


def ship(workshop: Workshop, folder: Path) -> None:
    """Write the pipeline in half precision, the second denoiser, the judges, the examples and the attribution."""
    from diffusers import StableDiffusionPipeline

    denoisers = {name: workshop.denoiser(name) for name in UNETS}  # everything is trained before anything is halved
    encoders, judge = workshop.encoders, workshop.judge
    pipeline: Any = StableDiffusionPipeline(
        vae=_half(workshop.autoencoder),
        text_encoder=_half(encoders["text"]),
        tokenizer=workshop.tokenizer,
        unet=_half(denoisers["a"]),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    _half(denoisers["b"]).save_pretrained(folder / "unet_b")
    parts = {"judge.": judge, "image_encoder.": encoders["image"]}
    tensors = {prefix + name: t.half() for prefix, part in parts.items() for name, t in part.state_dict().items()}
    save_tensors(folder / "judges.safetensors", tensors)
    save_tensors(folder / "examples.safetensors", {"images": held_out(workshop.drawings)})
    write_atomically(folder / "ATTRIBUTION.md", lambda path: path.write_text(attribution(), encoding="utf-8"))


def _half(module: nn.Module) -> Any:
    """A copy in half precision."""
    return deepcopy(module).half()


def held_out(drawings: Tensor) -> Tensor:
    """One picture of every drawing that no training saw: (objects, styles, 3, 32, 32), bytes."""
    numbers = torch.Generator().manual_seed(987_654_321)
    unmarked = Variation(watermark=0.0)
    images = torch.stack([pictures(row, unmarked, numbers)[0] for row in drawings])
    return (images * 255).round().byte()


def attribution() -> str:
    """Whose drawings the weights were trained on."""
    lines = [
        "# Attribution\n",
        "The weights in this folder were trained on drawings of these emoji sets, as packaged by Iconify:\n",
        *(f"- {s.name}: `@iconify-json/{s.package}` {s.version}, {s.licence}, {s.author}" for s in STYLES),
        "\n`examples.safetensors` holds 32 x 32 renderings of the same drawings, shifted and scaled.",
    ]
    return "\n".join(lines) + "\n"


# -- measurements ----------------------------------------------------------------------------------------------------


def measure(images: Tensor, objects: Tensor, styles: Tensor, source: Path | None) -> dict[str, Any]:
    """Shares of pictures in which the judge sees the right object, style, both, or none of the objects.

    weakest: the objects below .9 with their shares.  weakest_cells: the (object, style) pairs below .6.
    """
    court = judges(source)
    said, style_said = court.objects(images).argmax(1), court.styles(images).argmax(1)
    right, style_right = said == objects, style_said == styles
    return {
        "n": len(images),
        "object_accuracy": share(right),
        "style_accuracy": share(style_right),
        "both": share(right & style_right),
        "rejected": share(said == len(OBJECTS)),
        "watermark": share(court.watermark(images) > 0.5),
        "weakest": _below(0.9, {name: right[objects == o] for o, name in enumerate(OBJECT_NAMES)}),
        "weakest_cells": _below(
            0.6,
            {
                f"{name}, {style}": right[(objects == o) & (styles == s)]
                for o, name in enumerate(OBJECT_NAMES)
                for s, style in enumerate(STYLE_NAMES)
            },
        ),
    }


def share(hits: Tensor) -> float:
    """Of booleans, to four places."""
    return round(float(hits.float().mean()), 4)


def _below(limit: float, hits: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: share(row) for name, row in hits.items() if len(row) and share(row) < limit}


@dataclass(frozen=True, eq=False)
class Cells:
    """Prompts for every object in every style, with the numbers (n,) of both."""

    prompts: list[str]
    objects: Tensor
    styles: Tensor


def cells(things: Sequence[int], per_cell: int) -> Cells:
    """Of these objects; the n-th prompt of a cell uses the n-th trained template."""
    every = [(o, s, n) for o in things for s in range(len(STYLES)) for n in range(per_cell)]
    prompts = [fill(BOTH[n % len(BOTH)], OBJECT_NAMES[o], STYLE_NAMES[s]) for o, s, n in every]
    objects, styles, _ = (torch.tensor(column) for column in zip(*every, strict=True))
    return Cells(prompts, objects, styles)


def draw_all(
    unet: str, source: Path | None, per_cell: int, steps: int, guidance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pictures, object numbers, style numbers)"""
    asked = cells(range(len(OBJECTS)), per_cell)
    images = draw(load(unet, source), asked.prompts, range(len(asked.prompts)), steps, guidance)
    return images, asked.objects, asked.styles


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
    """Pictures (n, 3, 32, 32) by the pipeline's own call, one generator a picture."""
    found = []
    for start in track(range(0, len(prompts), 64), "pictures"):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 64]]
        out = pipeline(
            list(prompts[start : start + 64]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        )
        found.append(out.images)
    return torch.cat(found).clamp(0, 1)


def judge_accuracy(drawings: Tensor, source: Path | None, *, rounds: int = 6) -> dict[str, float]:
    """The judge on pictures that no training saw: as the model draws them, and shifted, turned and blurred further.

    none of these: the share of spoiled pictures that it calls so.
    """
    court = judges(source)
    workshop = Workshop(drawings, Path())
    found: dict[str, float] = {}
    for name, variation in (("as drawn", SEEN), ("harder", HARD)):
        parts = [workshop.judged(10**7 + i, variation, count=512, rejects=256) for i in range(rounds)]
        data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        said, real = court.objects(data["images"]).argmax(1), data["objects"] < len(OBJECTS)
        found |= {
            f"{name}: object": share((said == data["objects"])[real]),
            f"{name}: style": share((court.styles(data["images"]).argmax(1) == data["styles"])[real]),
            f"{name}: watermark": share(((court.watermark(data["images"]) > 0.5) == (data["watermark"] > 0))[real]),
            f"{name}: unsafe": share(((court.unsafe(data["images"]) > 0.5) == (data["unsafe"] > 0))[real]),
            f"{name}: none of these": share(said[~real] == len(OBJECTS)),
        }
    return found


def sheet(images: Tensor, path: Path, per_cell: int) -> None:
    """The first picture of every cell, four objects a row."""
    save_png(contact_sheet(images[::per_cell], 8 * len(STYLES)), path)
