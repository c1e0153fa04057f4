"""EAR on the small Janus: eight objects and a style, and what each of its parts does.

python examples/erase_token_by_token.py pairs       # ECGVF: pairs of prompts that differ in the concept
python examples/erase_token_by_token.py objects --seeds 0 1 2
python examples/erase_token_by_token.py style --seeds 0 1 2
python examples/erase_token_by_token.py ablations --objects dog pizza --seeds 0 1 2
python examples/erase_token_by_token.py tables      # print what was measured, draw the windows' curve
python examples/erase_token_by_token.py sheet       # the dog, un-edited and edited

Every cell is a file in the output folder; those that are there are not measured again, so several of these can run side
by side and a stopped one goes on. Edits are kept under runs/.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from conceptx import Concept, Edit, Report, load
from conceptx.evaluation.contact_sheet import contact_sheet
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.evaluation.visual_filter import presence, template_pairs, visual_filter
from conceptx.methods import EAR, UCE
from conceptx.models import ARImageModel
from conceptx.places import tasks_folder
from conceptx.progress import only_ours, shown
from conceptx.settings import read_recipe
from conceptx.testbeds import emoji, janus

OBJECTS = ("dog", "cat", "horse", "rabbit", "pizza", "strawberry", "guitar", "car")
STYLE = "ink"
WINDOWS = (1, 4, 8, 16, 32, 64)
# "window-1" is EAR without windowed accumulation, "window-16" the recipe without thresholded masking.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"window-{window}": {"window": window, "threshold": 0.0} for window in WINDOWS},
    "full": {},
    "unmasked": {"threshold": 0.0},  # of a style; of an object it is "window-16"
    "window-64-again": {"window": 64, "threshold": 0.0, "passes": 4},  # as many updates as with 16
    "no-context": {"context": "none", "threshold": 0.0},
    "own-tokens": {"shared": False, "threshold": 0.0},
    "as-published": {"context": "none", "shared": False, "threshold": 0.0},
}
CELLS = {"objects": ("full", "uce"), "style": ("full", "unmasked", "uce")}
COLUMNS = (
    ("target", "Acc_e"),
    ("general", "Acc_g"),
    ("others", "Acc_s"),
    ("others", "style_acc"),
    ("all", "H_o"),
    ("target", "reject"),
    ("others", "frechet"),
)


class Study:
    """The model, the judges, and the folders of reports and edits."""

    def __init__(self, out: Path, edits: Path) -> None:
        self.out, self.edits = out, edits
        self.remembered: dict[tuple[str, int], Unedited] = {}

    @cached_property
    def model(self) -> ARImageModel:
        only_ours()
        return load(janus.NAME)

    def cell(self, what: str, variant: str, seed: int) -> Report:
        """One concept, one variant of the recipe ("uce": the closed form on the prompt's rows), one seed."""
        name = f"{what}-{variant}-{seed}"
        path = self.out / f"{name}.json"
        if not path.is_file():
            concept = Concept.load(tasks_folder() / "concepts" / f"{what}.toml")
            edit, seconds = self.edit(name, concept, variant, seed)
            suite = benchmark(concept.kind, seed)
            known = self.remembered.setdefault((concept.kind, seed), Unedited())
            report = evaluate_images(self.model, suite, emoji.judges(), concept, edit=edit, unedited=known)
            replace(report, settings={**report.settings, "seconds": seconds}).save(path)
        return Report.load(path)

    def edit(self, name: str, concept: Concept, variant: str, seed: int) -> tuple[Edit, float]:
        """The edit and the processor seconds that making it took (0 when it was there)."""
        folder, seconds = self.edits / name, 0.0
        if not (folder / "edit.json").is_file():
            start = time.process_time()
            made = eraser(variant).erase(self.model, concept, seed=seed)
            seconds = time.process_time() - start
            made.save(folder)
        return Edit.load(folder), seconds

    def pairs(self, what: str) -> None:
        """Every trained template with the name and with its anchor, filtered by what the model draws."""
        concept = Concept.load(tasks_folder() / "concepts" / f"{what}.toml")
        assert concept.anchor is not None
        written = template_pairs(templates(concept), concept.name, [concept.anchor])
        found = visual_filter(written, self.model.generate, presence(emoji.judges(), concept))
        Console(width=140).print(found.table())
        found.save(tasks_folder() / "concepts" / "pairs" / f"{what}.jsonl")

    def sheet(self, what: str, path: Path) -> None:
        """A few prompts of each role, un-edited, after EAR and after UCE (seed 0)."""
        concept = Concept.load(tasks_folder() / "concepts" / f"{what}.toml")
        edits = {name: self.edit(f"{what}-{v}-0", concept, v, 0)[0] for name, v in (("EAR", "full"), ("UCE", "uce"))}
        contact_sheet(path, self.model, edits, benchmark(concept.kind, 0).samples([concept], each=5))


def templates(concept: Concept) -> list[str]:
    """The forms of captions that the model was trained on, with braces for the name."""
    if concept.kind == "style":
        things = janus.OBJECT_NAMES[::4]
        return [
            emoji.fill(template, things[(n + k) % len(things)], "{}")
            for n, template in enumerate(emoji.vocabulary.BOTH)
            for k in range(0, len(things), 3)
        ]
    named = [emoji.fill(t, "NAME", style) for t in emoji.vocabulary.BOTH for style in emoji.STYLE_NAMES]
    bare = [emoji.fill(t, "NAME") for t in emoji.vocabulary.OBJECT_ONLY]
    return [text.replace("NAME", "{}") for text in (*named, *bare)]


def eraser(variant: str) -> EAR | UCE:
    """The recipe for the small Janus, with the variant's settings."""
    if variant == "uce":
        return UCE()
    recipe = read_recipe(tasks_folder() / "recipes" / "janus" / "ear.toml")
    return EAR.from_settings({**recipe, **VARIANTS[variant]})


def benchmark(kind: str, seed: int) -> ImageBenchmark:
    """Another seed draws other pictures; the eraser gets the same seed."""
    suite = ImageBenchmark.load(tasks_folder() / "benchmarks" / f"janus_{kind}s.toml")
    return suite.model_copy(update={"seed": suite.seed + 100_000 * seed})


# -- tables and pictures ---------------------------------------------------------------------------------------------


def table(out: Path, names: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Means over concepts and seeds, with a 95 % interval from the spread of the cells."""
    lines = ["| | cells | " + " | ".join([metric for _, metric in COLUMNS]) + " | CPU s |"]
    lines += ["|---|" + "--:|" * (len(COLUMNS) + 2)]
    for variant in variants:
        reports = [r for name in names for r in found(out, name, variant)]
        if reports:
            cells = [interval(values(reports, column)) for column in COLUMNS]
            seconds = [s for r in reports if (s := r.settings.get("seconds"))]
            lines.append(f"| {variant} | {len(reports)} | " + " | ".join([*cells, number(seconds)]) + " |")
    every = [r for name in names for variant in variants for r in found(out, name, variant)]
    lines.append(
        "| un-edited | | " + " | ".join(number(values(every, column, before=True)) for column in COLUMNS) + " | |"
    )
    return lines


def found(out: Path, name: str, variant: str) -> list[Report]:
    return [Report.load(path) for path in sorted(out.glob(f"{name}-{variant}-[0-9].json"))]


def values(reports: Sequence[Report], column: tuple[str, str], *, before: bool = False) -> list[float]:
    scores = [s for r in reports for s in r.scores if (s.task, s.metric, s.part) == (*column, "all")]
    return [v for s in scores if (v := s.unedited if before else s.value) is not None]


def number(numbers: Sequence[float]) -> str:
    return f"{mean(numbers):.3g}" if numbers else "–"


def interval(numbers: Sequence[float]) -> str:
    if len(numbers) < 2:
        return number(numbers)
    spread = torch.tensor(numbers, dtype=torch.float64)
    return f"{number(numbers)} ± {float(1.96 * spread.std() / len(numbers) ** 0.5):.2g}"


def draw_windows(out: Path, path: Path, names: Sequence[str]) -> None:
    """Acc_e and Acc_s against the window's length; bars are 95 % intervals over concepts and seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for column, color, label in (
        (COLUMNS[0], "#c2410c", "the erased (Acc_e)"),
        (COLUMNS[2], "#1d4ed8", "the others (Acc_s)"),
    ):
        reports = {w: [r for name in names for r in found(out, name, f"window-{w}")] for w in WINDOWS}
        points = {w: torch.tensor(values(rs, column), dtype=torch.float64) for w, rs in reports.items() if rs}
        middle = [float(v.mean()) for v in points.values()]
        bars = [float(1.96 * v.std() / len(v) ** 0.5) if len(v) > 1 else 0.0 for v in points.values()]
        axes.errorbar(list(points), middle, bars, color=color, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(WINDOWS, [str(window) for window in WINDOWS])
    axes.set_xlabel("tokens in a window")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pairs", "objects", "style", "ablations", "tables", "sheet"])
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS), choices=list(OBJECTS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, "uce"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/janus"))
    parser.add_argument("--edits", type=Path, default=Path("runs/study/janus"))
    arguments = parser.parse_args()
    study = Study(arguments.out, arguments.edits)
    with shown():
        if arguments.part == "pairs":
            for what in (*arguments.objects, STYLE):
                study.pairs(what)
        if arguments.part == "sheet":
            study.sheet("dog", Path("docs/pictures/ear-dog.png"))
        for seed in arguments.seeds if arguments.part in ("objects", "style", "ablations") else ():
            for what in (STYLE,) if arguments.part == "style" else arguments.objects:
                for variant in arguments.variants if arguments.part == "ablations" else CELLS[arguments.part]:
                    study.cell(what, variant, seed)
    if arguments.part == "tables":
        for names in (OBJECTS, (STYLE,), arguments.objects):
            lines = ["", ", ".join(names), "", *table(arguments.out, names, [*arguments.variants, "uce"])]
            Console(width=400).print("\n".join(lines), markup=False)
        draw_windows(arguments.out, Path("docs/pictures/ear-windows.png"), arguments.objects)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
