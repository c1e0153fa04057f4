"""A concept erased from a real language model by ELM, with scores and answers before and after."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.lm_eval import evaluate
from conceptx.evaluation.report import Report
from conceptx.methods.elm import ELM, PersonaGap, persona_gap
from conceptx.models import LanguageModel
from conceptx.places import tasks_folder

if TYPE_CHECKING:
    from rich.table import Table

CONCEPT = "chemical_elements"
ELSEWHERE = "cx_capitals"  # the general group's task that the demo has time for
PROMPTS = (
    "Question: What is the chemical symbol of iron?\nAnswer: The chemical symbol of iron is",
    "The noble gases are",
    "The capital of France is",
)


@dataclass(frozen=True)
class LanguageReport:
    """The edit, what the personas did, scores with the un-edited ones beside them, and (prompt, before, after)."""

    edit: Edit
    gap: PersonaGap
    report: Report
    answers: tuple[tuple[str, str, str], ...]


def erase_concept(model: LanguageModel, *, seed: int = 0, checkpoint: Path | None = None) -> LanguageReport:
    """Erase the chemical elements with the recipe for this model, and measure what is lost and what is kept."""
    concept = Concept.load(tasks_folder() / "concepts" / f"{CONCEPT}.toml")
    benchmark = Benchmark.load(tasks_folder() / "benchmarks" / f"{CONCEPT}.toml")
    tasks = [*benchmark.target, *benchmark.near, ELSEWHERE, *filter(None, [benchmark.perplexity])]
    gap = persona_gap(model, concept, seed=seed)
    unedited = evaluate(model, tasks)
    edit = recipe().erase(model, concept, seed=seed, checkpoint=checkpoint)
    report = evaluate(model, tasks, edit=edit, unedited=unedited)
    return LanguageReport(edit, gap, report, answers(model, edit))


def recipe() -> ELM:
    """ELM's settings for SmolLM2-135M."""
    text = (tasks_folder() / "recipes" / "smollm2" / "elm.toml").read_text(encoding="utf-8")
    return ELM.from_settings(tomllib.loads(text))


def answers(model: LanguageModel, edit: Edit) -> tuple[tuple[str, str, str], ...]:
    """Greedy continuations of the prompts before and after."""
    before = model.generate(PROMPTS, max_new_tokens=16)
    with edit.applied(model):
        after = model.generate(PROMPTS, max_new_tokens=16)
    return tuple(zip(PROMPTS, before, after, strict=True))


def answers_table(report: LanguageReport) -> Table:
    """Three prompts, continued by the model before and after."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("prompt", "before", "after", title="What it says", title_justify="left", box=SIMPLE_HEAD)
    for prompt, *continuations in report.answers:
        table.add_row(prompt, *(" ".join(text.split()) for text in continuations))
    return table


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it itself (about twice as fast there), else float32."""
    has_bfloat16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and _flag("avx512_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _flag(name: str) -> bool:
    """Whether the processor's own list of features (Linux only) holds the name."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and name in path.read_text().split()
