"""A concept erased from a real text-to-image pipeline by UCE, judged and drawn before and after."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.contact_sheet import contact_sheet
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.images import evaluate_images
from conceptx.evaluation.report import Report
from conceptx.methods.uce import UCE
from conceptx.models import DiffusionModel
from conceptx.places import tasks_folder
from conceptx.testbeds import emoji

CONCEPT = "dog"
OTHERS = 40  # kept objects that the demo has time to draw
PROMPTS = ("a noto dog", "a twemoji dog", "an ink dog", "a puppy", "a pet that barks", "a noto cat", "a fluent owl")


@dataclass(frozen=True)
class ImageReport:
    """The edit, how long it took to make, scores with the un-edited ones beside them, and where the files are."""

    edit: Edit
    seconds: float
    report: Report
    sheet: Path
    lora: Path


def erase_dog(out: Path) -> ImageReport:
    """Erase the dog, measure what is lost and what is kept, draw both; edit, LoRA file and picture go into `out`."""
    model = DiffusionModel(emoji.load(), guidance=emoji.GUIDANCE)
    concept = Concept.load(tasks_folder() / "concepts" / f"{CONCEPT}.toml")
    started = time.monotonic()
    edit = UCE().erase(model, concept)
    seconds = time.monotonic() - started
    report = evaluate_images(model, short_benchmark(concept), emoji.judges(), concept, edit=edit)
    edit.save(out / "no-dog")
    lora = out / "no-dog-lora" / "pytorch_lora_weights.safetensors"
    edit.fold(model).export_diffusers_lora(lora, model)
    sheet = contact_sheet(out / "no-dog.png", model, {"UCE": edit}, PROMPTS, seed=7, steps=emoji.STEPS)
    return ImageReport(edit, seconds, report, sheet, lora)


def short_benchmark(concept: Concept) -> ImageBenchmark:
    """The object benchmark with fewer pictures: the concept, its neighbours and some others."""
    whole = ImageBenchmark.load(tasks_folder() / "benchmarks" / "emoji_objects.toml")
    (target,) = whole.targets_of([concept])
    names = dict.fromkeys([target.name, *target.near, *whole.objects[:: len(whole.objects) // OTHERS], "castle"])
    numbers = {"images": 12, "images_general": 4, "images_others": 1}
    return whole.model_copy(update={"objects": tuple(names), "targets": (target,), **numbers})
