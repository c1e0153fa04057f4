"""ELM on SmolLM2-135M over several seeds, beside the control of a meaningless persona pair of matched size.

python examples/erase_topic_study.py chemical_elements --seeds 0 1 2 --out docs/results

Settings (tasks/recipes/smollm2/elm.toml) come from runs scored on the dev halves of the questions; this scores the test
halves.
Runs that are already in the output folder are not repeated.
"""

import argparse
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from cells import edit_once, once, spread
from rich.console import Console

from conceptx import Concept, Edit, Personas, Report, evaluate, load
from conceptx.attacks import Relearning
from conceptx.demo.language import fast_dtype, recipe
from conceptx.evaluation.attacked import goal_of
from conceptx.evaluation.benchmark import Benchmark
from conceptx.methods.elm import persona_gap
from conceptx.models import LanguageModel
from conceptx.places import tasks_folder
from conceptx.progress import shown

NONSENSE = Personas(
    expert=("This was written on a Monday with a blue pen.",),
    novice=("This was written on a Tuesday with a black pen.",),
)
STRENGTHS = (0.5, 0.75, 1.25, 1.5)
KEY_SCORES = (
    ("target", "acc"),
    ("open", "exact_match"),
    ("near", "acc"),
    ("general", "acc"),
    ("cx_perplexity", "word_perplexity"),
    ("fluency", "reverse_perplexity"),
    ("fluency", "distinct_2"),
)


class Study:
    """One concept; every report is kept as a file, so an interrupted study goes on where it stopped."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out / name
        self.model: LanguageModel = load("smollm2", dtype=fast_dtype())
        self.concept = Concept.load(tasks_folder() / "concepts" / f"{name}.toml")
        self.benchmark = Benchmark.load(tasks_folder() / "benchmarks" / f"{name}.toml")

    def unedited(self) -> Report:
        return self._kept("unedited", lambda: self.benchmark.run(self.model, self.concept))

    def run(self, kind: str, seed: int) -> Report:
        """kind: personas, or control (nonsense pair, eta scaled so that eta times its size is the same)."""
        return self._kept(f"{kind}-{seed}", lambda: self._score(self._edit(kind, seed)))

    def strength(self, seed: int, strength: float) -> Report:
        """The edit of a seed at another strength: the trade-off curve."""
        return self._kept(f"strength-{strength}", lambda: self._score(strength * self._edit("personas", seed)))

    def relearnt(self, seed: int, steps: int) -> Report:
        """After plain next-token training of a new adapter on the concept's texts, on top of a seed's edit."""
        return self._kept(f"relearnt-{steps}", lambda: self._relearn(self._edit("personas", seed), seed, steps))

    def _relearn(self, edit: Edit, seed: int, steps: int) -> Report:
        attack = Relearning("lora", 1, texts=8 * steps, batch_size=8, learning_rate=5e-4, max_tokens=36, rank=8)
        attempts = attack.attempts(self.model, goal_of(self.concept), seed=seed)
        with edit.applied(self.model), closing(attempts):
            next(attempts)
            return evaluate(self.model, self.benchmark.target).beside(self.unedited())

    def _edit(self, kind: str, seed: int) -> Edit:
        folder = Path("runs/study") / self.name / f"{kind}-{seed}"
        return edit_once(folder, lambda: self._erase(kind, seed, folder / "checkpoint"))[0]

    def _erase(self, kind: str, seed: int, checkpoint: Path) -> Edit:
        concept, settings = self.concept, recipe()
        if kind == "control":
            concept = Concept(**{**concept.model_dump(), "personas": NONSENSE})
            sizes = [persona_gap(self.model, c, texts=48).size for c in (self.concept, concept)]
            settings = replace(settings, eta=settings.eta * sizes[0] / sizes[1])
        return settings.erase(self.model, concept, seed=seed, checkpoint=checkpoint)

    def _score(self, edit: Edit) -> Report:
        return self.benchmark.run(self.model, self.concept, edit=edit, unedited=self.unedited())

    def _kept(self, name: str, make: Callable[[], Report]) -> Report:
        return once(self.out / f"{name}.json", make)


def table(name: str, before: Report, runs: dict[str, list[Report]]) -> str:
    """Mean and range over the seeds, as markdown; target and open also for seen and unseen members."""
    lines = [f"| {name} | N | before | " + " | ".join(runs) + " |", "|---|--:|--:|" + "--:|" * len(runs)]
    first = next(iter(runs.values()))[0]
    parts = [s.key for s in first.scores if s.part != "all" and s.task.startswith(f"cx_{name}")]
    for key in [*((task, metric, "all") for task, metric in KEY_SCORES), *parts]:
        if key not in {s.key for s in first.scores}:
            continue
        cells = [spread([report[key].value for report in reports]) for reports in runs.values()]
        label = " ".join(key[:2]) + ("" if key[2] == "all" else f", {key[2]}")
        lines.append(f"| {label} | {first[key].n} | {before[key].value:.3g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(study: Study, before: Report, curve: dict[float, Report], path: Path) -> None:
    """Accuracy of target, near and general against the strength of one edit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    points = {0.0: before, **curve}
    for role, color in (("target", "#c2410c"), ("near", "#a16207"), ("general", "#1d4ed8")):
        scores = [points[s][role] for s in sorted(points)]
        errors = [score.error or 0.0 for score in scores]
        panel.errorbar(
            sorted(points), [s.value for s in scores], errors, color=color, marker="o", capsize=2, label=role
        )
    panel.axhline(0.25, color="black", linestyle=":", linewidth=1, label="chance")
    panel.set_xlabel("strength of the edit")
    panel.set_ylabel("accuracy, test half")
    panel.set_title(f"ELM, {study.concept.name}, SmolLM2-135M (bars: standard error)", fontsize=10)
    panel.set_ylim(0, 1)
    panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept", help="name of a file in tasks/concepts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=["personas", "control"], default=["personas", "control"])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--curve", action="store_true", help="also score the first seed's edit at other strengths")
    parser.add_argument("--relearn", type=int, nargs="*", default=[], help="also after so many steps of relearning")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", FutureWarning)
    study, console = Study(arguments.concept, arguments.out), Console()
    relearnt = {}
    with shown():
        before = study.unedited()
        runs = {kind: [study.run(kind, seed) for seed in arguments.seeds] for kind in arguments.kinds}
        if arguments.curve:
            curve = {s: study.strength(arguments.seeds[0], s) for s in STRENGTHS}
            curve[1.0] = study.run("personas", arguments.seeds[0])
            draw(study, before, curve, Path("docs/pictures") / f"elm-{arguments.concept}.png")
        relearnt = {steps: study.relearnt(arguments.seeds[0], steps) for steps in arguments.relearn}
    console.print(table(arguments.concept, before, runs), markup=False)
    for steps, report in relearnt.items():
        scores = [score for score in report.scores if score.task == study.benchmark.target[0]]
        console.print(f"relearnt, {steps} steps:", *(f"{s.part} {s.value:.3f}" for s in scores))


if __name__ == "__main__":
    main()
