"""EAR on the small Janus: eight objects and a style, and what each of its parts does.

python examples/erase_token_by_token.py pairs       # ECGVF: pairs of prompts that differ in the concept
python examples/erase_token_by_token.py erase       # every concept by EAR and by UCE, --seeds 0 1 2
python examples/erase_token_by_token.py ablations   # the dog, the pizza and the style
python examples/erase_token_by_token.py tables      # print what was measured, draw the windows' curve
python examples/erase_token_by_token.py sheet       # the dog and the style, un-edited and edited

Every cell is a file in the output folder; those that are there are not measured again, so several of these can run side
by side (`--concepts dog`, `--variants window-1`) and a stopped one goes on. Edits are kept under runs/.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cells import average, drawn_benchmark, edit_once, kept_shares, once, seeds_of, values
from rich.console import Console

from conceptx import Concept, Edit, Report, load
from conceptx.evaluation.contact_sheet import contact_sheet
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
CONCEPTS = (*OBJECTS, STYLE)
ABLATED = ("dog", "pizza", STYLE)
WINDOWS = (1, 4, 8, 16, 32, 64)
# "full": the recipe.  "window-1": without windowed accumulation.  "window-16": the recipe without masking.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    **{f"window-{window}": {"window": window, "threshold": 0.0} for window in WINDOWS},
    "window-64-again": {"window": 64, "threshold": 0.0, "passes": 4},  # as many updates as with 16
    "threshold-3": {"threshold": 3.0},
    **{f"layers-{layers}": {"layers": [0, layers]} for layers in (2, 4, 6)},
    "own-tokens": {"shared": False, "threshold": 0.0},
    "no-context": {"context": "none", "threshold": 0.0},
    "as-published": {"context": "none", "shared": False, "threshold": 0.0},
    "searched": {},  # another recipe: what `conceptx tune` found on the style
    "uce": {},
}
COMPARED = ("full", "searched", "uce")
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
        return once(self.out / f"{what}-{variant}-{seed}.json", lambda: self.measure(what, variant, seed))

    def measure(self, what: str, variant: str, seed: int) -> Report:
        concept = concept_of(what)
        edit, seconds = self.edit(what, variant, seed)
        suite = drawn_benchmark(f"janus_{concept.kind}s", seed)
        known = self.remembered.setdefault((concept.kind, seed), Unedited())
        report = evaluate_images(self.model, suite, emoji.judges(), concept, edit=edit, unedited=known)
        return replace(report, settings={**report.settings, "seconds": seconds})

    def edit(self, what: str, variant: str, seed: int) -> tuple[Edit, float]:
        folder = self.edits / f"{what}-{variant}-{seed}"
        return edit_once(folder, lambda: eraser(variant).erase(self.model, concept_of(what), seed=seed))

    def pairs(self, what: str) -> None:
        """Every trained template with the name and with its anchor, filtered by what the model draws."""
        concept = concept_of(what)
        assert concept.anchor is not None
        written = template_pairs(templates(concept), concept.name, [concept.anchor])
        found = visual_filter(written, self.model.generate, presence(emoji.judges(), concept))
        Console(width=140).print(found.table())
        found.save(tasks_folder() / "concepts" / "pairs" / f"{what}.jsonl")

    def sheet(self, what: str, path: Path) -> None:
        """A few prompts of each role, un-edited, after EAR and after UCE (seed 0)."""
        concept = concept_of(what)
        edits = {name: self.edit(what, variant, 0)[0] for name, variant in (("EAR", "full"), ("UCE", "uce"))}
        prompts = drawn_benchmark(f"janus_{concept.kind}s", 0).samples([concept], each=5)
        contact_sheet(path, self.model, edits, prompts)


def concept_of(name: str) -> Concept:
    return Concept.load(tasks_folder() / "concepts" / f"{name}.toml")


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
    name = "ear_searched.toml" if variant == "searched" else "ear.toml"
    recipe = read_recipe(tasks_folder() / "recipes" / "janus" / name)
    return EAR.from_settings({**recipe, **VARIANTS[variant]})


# -- tables and pictures ---------------------------------------------------------------------------------------------


def over_objects(out: Path) -> list[str]:
    """Means over the objects and the seeds, with a 95 % interval from the spread of the cells."""
    heads = [metric for _, metric in COLUMNS]
    lines = ["| | runs | " + " | ".join(heads) + " | others kept | CPU s |", "|---|" + "--:|" * (len(COLUMNS) + 3)]
    for variant in COMPARED:
        reports = [report for name in OBJECTS for report in seeds_of(out, f"{name}-{variant}")]
        cells = [interval(values(reports, *column)) for column in COLUMNS]
        seconds = [s for r in reports if (s := r.settings.get("seconds"))]
        cells += [interval(kept_shares(reports)), average(seconds)]
        lines.append(f"| {variant} | {len(reports)} | " + " | ".join(cells) + " |")
    every = [report for name in OBJECTS for report in seeds_of(out, f"{name}-full")]
    before = [average(values(every, *column, before=True)) for column in COLUMNS]
    return [*lines, f"| un-edited | | {' | '.join(before)} | | |"]


def ablated(out: Path) -> list[str]:
    """Acc_e and the share of Acc_s that is kept, with 95 % intervals over the seeds."""
    lines = ["| | " + " | ".join(f"{name}: Acc_e | kept" for name in ABLATED) + " | CPU s |"]
    lines += ["|---|" + "--:|" * (2 * len(ABLATED) + 1)]
    for variant in VARIANTS:
        found = {name: seeds_of(out, f"{name}-{variant}") for name in ABLATED}
        cells = [interval(n) for rs in found.values() for n in (values(rs, *COLUMNS[0]), kept_shares(rs))]
        seconds = [s for rs in found.values() for r in rs if (s := r.settings.get("seconds"))]
        lines.append(f"| {variant} | " + " | ".join([*cells, average(seconds)]) + " |")
    return lines


def by_concept(out: Path) -> list[str]:
    """Acc_e, Acc_g and the share of Acc_s that is kept, and the lowest share of a single run."""
    lines = ["| | " + " | ".join(COMPARED) + " |", "|---|" + "--:|" * len(COMPARED)]
    for name in CONCEPTS:
        cells = []
        for reports in (seeds_of(out, f"{name}-{variant}") for variant in COMPARED):
            shares = kept_shares(reports)
            numbers = [*(average(values(reports, *column)) for column in COLUMNS[:2]), average(shares)]
            cells.append(", ".join(numbers) + f" (lowest {min(shares, default=0):.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def interval(numbers: Sequence[float]) -> str:
    if len(numbers) < 2:
        return average(numbers)
    spread = torch.tensor(numbers, dtype=torch.float64)
    return f"{average(numbers)} ± {float(1.96 * spread.std() / len(numbers) ** 0.5):.2g}"


def draw_windows(out: Path, path: Path) -> None:
    """Acc_e and Acc_s against the window's length, a panel a concept; bars are 95 % intervals over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for name, axes in zip(ABLATED, figure.subplots(1, len(ABLATED), sharey=True), strict=True):
        for column, color, label in (
            (COLUMNS[0], "#c2410c", "the erased (Acc_e)"),
            (COLUMNS[2], "#1d4ed8", "the others (Acc_s)"),
        ):
            points = {w: torch.tensor(values(seeds_of(out, f"{name}-window-{w}"), *column)) for w in WINDOWS}
            known = {w: v for w, v in points.items() if len(v) > 1}
            bars = [float(1.96 * v.std() / len(v) ** 0.5) for v in known.values()]
            means = [float(v.mean()) for v in known.values()]
            axes.errorbar(list(known), means, bars, color=color, marker="o", capsize=3, label=label)
        axes.set_title(name)
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
    parser.add_argument("part", choices=["pairs", "erase", "ablations", "tables", "sheet"])
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, help="default: all, or the three of the ablations")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="default: full, searched and uce, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/janus"))
    parser.add_argument("--edits", type=Path, default=Path("runs/study/janus"))
    arguments = parser.parse_args()
    study, part = Study(arguments.out, arguments.edits), arguments.part
    concepts = arguments.concepts or (ABLATED if part == "ablations" else CONCEPTS)
    with shown():
        if part == "pairs":
            for what in concepts:
                study.pairs(what)
        if part == "sheet":
            for what in ("dog", STYLE):
                study.sheet(what, Path(f"docs/pictures/ear-{what}.png"))
        if part in ("erase", "ablations"):
            variants = arguments.variants or (COMPARED if part == "erase" else VARIANTS)
            for seed in arguments.seeds:
                for what in concepts:
                    for variant in variants:
                        study.cell(what, variant, seed)
    if part == "tables":
        for lines in (over_objects(arguments.out), by_concept(arguments.out), ablated(arguments.out)):
            Console(width=400).print("\n".join(["", *lines]), markup=False)
        draw_windows(arguments.out, Path("docs/pictures/ear-windows.png"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
