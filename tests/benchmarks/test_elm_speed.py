"""ELM's items a second against the published item loop, both in one run on the real model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from benchmarks.published_elm import published_loop

from conceptx.concept import Concept
from conceptx.demo.language import fast_dtype, recipe
from conceptx.methods import elm
from conceptx.models import LanguageModel, load
from conceptx.places import tasks_folder

pytestmark = pytest.mark.benchmark

ITEMS = 16  # pairs of one forget and one retain text through the published loop
EPOCHS = 4  # the paper's 3,000 steps of four items go four times over its 3,000 Harry Potter texts


def seconds_per_item(run: Callable[[], object], items: int) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / items


def ours(model: LanguageModel, concept: Concept, epochs: int) -> float:
    """Teachers and training. As in the loop it is compared with, no fluency texts and no persona check."""
    settings = replace(recipe(), steps=ITEMS * epochs // 4, batch_size=4, fluency_weight=0)
    few = Concept(**{**concept.model_dump(), "texts": concept.texts[:: len(concept.texts) // ITEMS][:ITEMS]})
    return seconds_per_item(lambda: settings.erase(model, few), ITEMS * epochs)


def test_elm_is_three_times_faster_than_the_published_item_loop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elm, "_warn_about_personas", lambda *_: None)  # once a run, whatever its length
    concept = Concept.load(tasks_folder() / "concepts" / "chemical_elements.toml")
    single = load("smollm2", dtype=torch.float32)
    published_loop(recipe(), single, concept, 2)  # warm
    published = seconds_per_item(lambda: published_loop(recipe(), single, concept, ITEMS), ITEMS)
    fast = load("smollm2", dtype=fast_dtype())
    rows = {
        f"float32, {EPOCHS} epochs": ours(single, concept, EPOCHS),
        f"{fast_dtype()}, 1 epoch": ours(fast, concept, 1),
        f"{fast_dtype()}, {EPOCHS} epochs": ours(fast, concept, EPOCHS),
    }
    with capsys.disabled():
        print(f"\npublished loop, float32: {1 / published:.2f} items/s")
        for name, mine in rows.items():
            print(f"ours, {name}: {1 / mine:.2f} items/s, ratio {published / mine:.1f}")
    assert published / rows[f"{fast_dtype()}, {EPOCHS} epochs"] >= 3
