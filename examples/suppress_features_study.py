"""PISCES on SmolLM2-135M: features found by themselves, every retained domain, and controls of the same rows and norm.

python examples/suppress_features_study.py chemical_elements capitals --out docs/results/pisces

Settings (tasks/recipes/smollm2/CONCEPT/pisces.toml) were chosen on the dev halves of the questions; this scores the
test halves. What is already in the output folder is not repeated.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cells import edit_once, once
from rich.console import Console

from conceptx import Concept, Edit, Report, evaluate, load
from conceptx.demo.language import fast_dtype
from conceptx.edit import Columns
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.report import Score
from conceptx.methods import PISCES
from conceptx.models import LanguageModel
from conceptx.places import tasks_folder
from conceptx.progress import shown
from conceptx.settings import read_recipe

CONTROLS = (0, 1, 2, 3)  # seeds
WEAKER = (0.4,)  # shares of the edit


class Study:
    def __init__(self, model: LanguageModel, name: str, out: Path) -> None:
        self.model, self.name, self.out = model, name, out / name
        self.concept = Concept.load(tasks_folder() / "concepts" / f"{name}.toml")
        self.benchmark = Benchmark.load(tasks_folder() / "benchmarks" / f"{name}.toml")
        self.eraser = PISCES.from_settings(read_recipe(tasks_folder() / "recipes" / "smollm2" / name / "pisces.toml"))

    def edit(self) -> Edit:
        folder = Path("runs/pisces") / self.name
        return edit_once(folder, lambda: self.eraser.erase(self.model, self.concept))[0]

    def edited(self) -> Report:
        return self._kept("edited", lambda: self.benchmark.run(self.model, self.concept, edit=self.edit()))

    def weaker(self, strength: float) -> Report:
        """The same edit, less of it."""
        name = f"edited-{strength}"
        return self._kept(name, lambda: self.benchmark.run(self.model, self.concept, edit=strength * self.edit()))

    def control(self, seed: int) -> Report:
        """The target alone: the same number of value vectors of the same layers, changed by as much, but at random."""
        tasks = [*self.benchmark.target, *self.benchmark.open]
        edit = at_random(self.edit(), self.model, seed)
        return self._kept(f"control-{seed}", lambda: evaluate(self.model, tasks, edit=edit))

    def _kept(self, name: str, make: Callable[[], Report]) -> Report:
        return once(self.out / f"{name}.json", make)


def at_random(edit: Edit, model: LanguageModel, seed: int) -> Edit:
    """Other value vectors of the same layers, moved in other directions by as much."""
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, delta in edit.deltas.items():
        assert isinstance(delta, Columns)  # what PISCES changes
        rows = torch.randperm(model.parameter_shape(name)[1], generator=draw)[: len(delta.index)]
        change = torch.randn(delta.change.shape, generator=draw)
        deltas[name] = Columns(rows, change / change.norm(dim=0) * delta.change.norm(dim=0))
    return Edit(model.fingerprint, deltas=deltas)


def drop(score: Score) -> float:
    assert score.unedited is not None
    return score.unedited - score.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="+", help="names of files in tasks/concepts")
    parser.add_argument("--out", type=Path, default=Path("docs/results/pisces"))
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console, model = Console(), load("smollm2", dtype=fast_dtype())
    for name in arguments.concepts:
        study = Study(model, name, arguments.out)
        with shown():
            edit, report = study.edit(), study.edited()
            weaker = {strength: study.weaker(strength) for strength in WEAKER}
            controls = [study.control(seed) for seed in CONTROLS]
        record = edit.provenance[0]
        console.print(f"{name}: features {record['features']}, rows {record['rows']}", markup=False)
        console.print(report.table())
        for strength, part in weaker.items():
            console.print(part.table(f"{strength} of it"))
        lost = drop(report["target"])
        moved = [drop(control[study.benchmark.target[0]]) for control in controls]
        console.print(f"target lost {lost:.3f}; controls {', '.join(f'{m:+.3f}' for m in moved)}")


if __name__ == "__main__":
    main()
