"""Closed-form erasers on many concepts at once: the emoji model, 1 to 100 objects, a style, and an unsafe category.

python examples/erase_many_study.py objects --methods uce speed --counts 1 10 50 100 --seeds 0 1 2
python examples/erase_many_study.py transfer     # the same files on the second denoiser, nothing fitted again
python examples/erase_many_study.py style
python examples/erase_many_study.py unsafe
python examples/erase_many_study.py tables       # print what was measured and draw the curves

Every cell is a file in the output folder; those that are there are not measured again, so several of these can run side
by side and a stopped one goes on. Edits are kept under runs/.
"""

import argparse
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cells import average, drawn_benchmark, edit_once, once, seeds_of, spread, values
from rich.console import Console

from conceptx import Concept, Edit, Report, load, methods
from conceptx.eraser import Eraser
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.models import DiffusionModel
from conceptx.places import tasks_folder
from conceptx.progress import only_ours, shown
from conceptx.settings import read_recipe
from conceptx.testbeds import emoji

COUNTS = (1, 10, 50, 100)
FEW = 7  # concepts up to which a method keeps its settings for a few
CLAIMED = {  # up to how many concepts a method's paper goes
    "uce": 100,
    "rece": 100,
    "speed": 100,
    "mace": 100,
    "trce": 10,
    "realera": 10,
    "itd": 100,
}
COLUMNS = (
    ("target", "Acc_e"),
    ("general", "Acc_g"),
    ("others", "Acc_s"),
    ("all", "H_o"),
    ("target", "reject"),
    ("others", "style_acc"),
    ("others", "frechet"),
)
COLORS = {
    "uce": "#6b7280",
    "rece": "#c2410c",
    "speed": "#1d4ed8",
    "mace": "#15803d",
    "trce": "#7e22ce",
    "realera": "#a16207",
    "itd": "#be185d",
}


class Study:
    """The model, the judges, and the folders of reports and edits."""

    def __init__(self, out: Path, edits: Path) -> None:
        self.out, self.edits = out, edits
        self.remembered: dict[tuple[str, int], Unedited] = {}

    @cached_property
    def model(self) -> DiffusionModel:
        only_ours()
        return load(emoji.NAME)

    @cached_property
    def other(self) -> DiffusionModel:
        """A second denoiser behind the same text encoder."""
        return DiffusionModel(emoji.load("b"), guidance=emoji.GUIDANCE)

    def objects(self, method: str, count: int, seed: int) -> Report:
        """Random objects at once, each with an anchor of its own group; all the rest is retained."""
        name = f"objects-{method}-{count}-{seed}"
        return self.kept(name, lambda: self.scored(name, method, crowd(count, seed), crowded(count, seed), seed))

    def transferred(self, method: str, count: int, seed: int) -> Report:
        """The edit of `objects` on the other denoiser."""
        concepts, suite = crowd(count, seed), crowded(count, seed)
        edit, _ = self.edit(f"objects-{method}-{count}-{seed}", method, concepts, seed)
        return self.kept(
            f"transfer-{method}-{count}-{seed}", lambda: self.score("b", self.other, suite, concepts, edit, seed)
        )

    def style(self, method: str, seed: int) -> Report:
        """`ink`, as in tasks/concepts/ink.toml, with captions of other styles for the methods that want a corpus."""
        concept = Concept.load(tasks_folder() / "concepts" / "ink.toml")
        others = [style for style in emoji.STYLE_NAMES if style != concept.name]
        texts = [f"{style} {thing.name}" for style in others for thing in emoji.OBJECTS]
        suite = drawn_benchmark("emoji_styles", seed, images=60, images_others=30)
        name = f"style-{method}-{seed}"
        erased = [concept.model_copy(update={"retain_texts": tuple(texts)})]
        return self.kept(name, lambda: self.scored(name, method, erased, suite, seed))

    def unsafe(self, method: str, seed: int) -> Report:
        """The seven weapons at once."""
        things = [thing for thing in emoji.OBJECTS if thing.group == emoji.vocabulary.UNSAFE_GROUP]
        concepts = [concept(thing, "umbrella", rest(things)) for thing in things]
        suite = drawn_benchmark("emoji_objects", seed, images=12, images_general=4, images_others=1)
        name = f"unsafe-{method}-{seed}"
        return self.kept(name, lambda: self.scored(name, method, concepts, suite, seed))

    def scored(self, name: str, method: str, concepts: Sequence[Concept], suite: ImageBenchmark, seed: int) -> Report:
        edit, seconds = self.edit(name, method, concepts, seed)
        report = self.score("a", self.model, suite, concepts, edit, seed)
        size = sum(path.stat().st_size for path in (self.edits / name).iterdir())
        return replace(report, settings={**report.settings, "seconds": seconds, "bytes": size})

    def score(
        self,
        denoiser: str,
        model: DiffusionModel,
        suite: ImageBenchmark,
        concepts: Sequence[Concept],
        edit: Edit,
        seed: int,
    ) -> Report:
        known = self.remembered.setdefault((denoiser, seed), Unedited())
        return evaluate_images(model, suite, emoji.judges(), concepts, edit=edit, unedited=known)

    def edit(self, name: str, method: str, concepts: Sequence[Concept], seed: int) -> tuple[Edit, float]:
        """The edit and the processor seconds that making it took (0 when it was there)."""
        task = eraser(method, len(concepts))
        target: Any = list(concepts)
        return edit_once(self.edits / name, lambda: task.erase(self.model, target, seed=seed))

    def kept(self, name: str, make: Callable[[], Report]) -> Report:
        return once(self.out / f"{name}.json", make)


def crowded(count: int, seed: int) -> ImageBenchmark:
    return drawn_benchmark("emoji_objects", seed, images=max(2, 40 // count), images_general=1, images_others=1)


def crowd(count: int, seed: int) -> list[Concept]:
    """Random objects to erase; the anchor of each is a kept object of the same group, where there is one."""
    things = list(emoji.OBJECTS)
    random.Random(seed).shuffle(things)
    erased, others = things[:count], rest(things[:count])
    anchors = {thing.name: [other.name for other in things[count:] if other.group == thing.group] for thing in erased}
    return [concept(thing, (anchors[thing.name] or others)[0], others) for thing in erased]


def rest(erased: Sequence[emoji.EmojiObject]) -> list[str]:
    return [thing.name for thing in emoji.OBJECTS if thing not in erased]


def concept(thing: emoji.EmojiObject, anchor: str, others: Sequence[str]) -> Concept:
    """With captions of what is kept, for the methods that want a corpus."""
    styles = emoji.STYLE_NAMES
    captions = [f"{styles[i % len(styles)]} {name}" for i, name in enumerate(others)]
    return Concept(
        thing.name,
        kind="object",
        anchor=anchor,
        retain=tuple(others),
        prompts=(thing.name,),
        retain_texts=tuple(captions),
    )


def eraser(method: str, count: int) -> Eraser:
    """With the recipe for the emoji model where there is one (UCE's is for single objects), else as published.

    A recipe for many concepts goes before one for a few.
    """
    recipes = tasks_folder() / "recipes" / "emoji"
    names = [f"{method}_many.toml"] * (count > FEW) + [f"{method}.toml"] * (method != "uce")
    found = [path for name in names if (path := recipes / name).is_file()]
    return class_of(method).from_settings(read_recipe(found[0]) if found else {})


def class_of(method: str) -> type[Eraser]:
    names = {module: name for name, module in methods.MODULES.items()}
    return getattr(methods, names[method])


# -- tables and pictures ---------------------------------------------------------------------------------------------


def table(out: Path, prefix: str, counts: Sequence[int | None], names: Sequence[str]) -> list[str]:
    """Mean over the seeds, and the smallest and largest of them."""
    heads = [metric for _, metric in COLUMNS]
    lines = ["| | concepts | seeds | " + " | ".join([*heads, "CPU s", "kB"]) + " |"]
    lines += ["|---|" + "--:|" * (len(heads) + 4)]
    for count in counts:
        for method in names:
            reports = found(out, prefix, method, count)
            if reports:
                cells = [spread(values(reports, *column)) for column in COLUMNS]
                seconds = [s for r in reports if (s := r.settings.get("seconds"))]
                sizes = [r.settings["bytes"] / 1000 for r in reports if "bytes" in r.settings]
                row = [method, str(count or "–"), str(len(reports)), *cells, average(seconds), average(sizes)]
                lines.append("| " + " | ".join(row) + " |")
        if any(found(out, prefix, method, count) for method in names):
            lines.append(before(out, prefix, count, names))
    return lines


def before(out: Path, prefix: str, count: int | None, names: Sequence[str]) -> str:
    reports = [report for method in names for report in found(out, prefix, method, count)]
    cells = [average(values(reports, *column, before=True)) for column in COLUMNS]
    return "| " + " | ".join(["un-edited", str(count or "–"), "", *cells, "–", "–"]) + " |"


def found(out: Path, prefix: str, method: str, count: int | None) -> list[Report]:
    return seeds_of(out, f"{prefix}-{method}" + ("" if count is None else f"-{count}"))


def draw_curves(out: Path, path: Path, names: Sequence[str]) -> None:
    """Acc_e, Acc_s and H_o of each method against the number of concepts; bars are the seeds' smallest and largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for panel, column in zip(figure.subplots(1, 3, sharey=True), (COLUMNS[0], COLUMNS[2], COLUMNS[3]), strict=True):
        for method in names:
            points = {count: values(found(out, "objects", method, count), *column) for count in COUNTS}
            points = {count: measured for count, measured in points.items() if measured}
            middle = [mean(measured) for measured in points.values()]
            bars = [
                [m - min(v) for m, v in zip(middle, points.values(), strict=True)],
                [max(v) - m for m, v in zip(middle, points.values(), strict=True)],
            ]
            panel.errorbar(list(points), middle, bars, color=COLORS[method], marker="o", capsize=2, label=method)
        panel.set_xscale("log")
        panel.set_xticks(COUNTS, [str(count) for count in COUNTS])
        panel.set_xlabel("concepts erased at once")
        panel.set_title({"Acc_e": "the erased (low is good)", "Acc_s": "the others", "H_o": "H_o"}[column[1]])
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["objects", "transfer", "style", "unsafe", "tables"])
    parser.add_argument("--methods", nargs="+", default=list(CLAIMED), choices=list(CLAIMED))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/emoji-many"))
    parser.add_argument("--edits", type=Path, default=Path("runs/study/emoji-many"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    study, names = Study(arguments.out, arguments.edits), arguments.methods
    with shown():
        for seed in arguments.seeds if arguments.part != "tables" else ():
            for method in names:
                if arguments.part in ("style", "unsafe"):
                    getattr(study, arguments.part)(method, seed)
                    continue
                for count in (count for count in arguments.counts if count <= CLAIMED[method]):
                    measure = study.objects if arguments.part == "objects" else study.transferred
                    measure(method, count, seed)
    if arguments.part == "tables":
        draw_curves(arguments.out, Path("docs/pictures/emoji-many.png"), names)
        say = partial(Console(width=400).print, markup=False)
        for prefix, counts in (("objects", COUNTS), ("transfer", COUNTS), ("style", (None,)), ("unsafe", (None,))):
            say("\n".join(["", prefix, "", *table(arguments.out, prefix, counts, names)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
