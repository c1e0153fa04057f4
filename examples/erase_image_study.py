"""UCE and ESD on the emoji model: ten objects over seeds, a style, and an attack.

python examples/erase_image_study.py objects --objects dog cat --seeds 0 1 2
python examples/erase_image_study.py style
python examples/erase_image_study.py attack
python examples/erase_image_study.py tables      # print what was measured, draw the contact sheets

Every cell is a file in the output folder; those that are there are not measured again, so several of these can run side
by side and a stopped one goes on.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from cells import average, drawn_benchmark, edit_once, kept_shares, once, spread, values
from rich.console import Console

from conceptx import Concept, Edit, Report, load
from conceptx.attacks.textual_inversion import TextualInversion
from conceptx.eraser import Eraser
from conceptx.evaluation.contact_sheet import contact_sheet
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.methods import ESD, UCE
from conceptx.models import DiffusionModel
from conceptx.places import tasks_folder
from conceptx.progress import only_ours, shown
from conceptx.settings import build, read_recipe
from conceptx.testbeds import emoji

OBJECTS = ("dog", "cat", "horse", "rabbit", "strawberry", "pizza", "guitar", "mobile_phone", "car", "rocket")
METHODS = ("uce", "esd-x", "esd-u")
COLUMNS = (
    ("target", "Acc_e"),
    ("general", "Acc_g"),
    ("others", "Acc_s"),
    ("all", "H_o"),
    ("target", "style_kept"),
    ("target", "reject"),
    ("target", "margin"),
    ("others", "style_acc"),
    ("others", "similarity"),
    ("others", "frechet"),
    ("others", "drift"),
)


class Study:
    """The model, the judges, and the folder of reports."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.remembered: dict[int, Unedited] = {}

    @cached_property
    def model(self) -> DiffusionModel:
        only_ours()
        return load(emoji.NAME)

    def single(self, kind: str, name: str, method: str, seed: int) -> Report:
        """One concept erased by one method."""
        concept = Concept.load(tasks_folder() / "concepts" / f"{name}.toml")
        suite = drawn_benchmark("emoji_objects", seed, images=20, images_general=5, images_others=1)
        suite = (
            halved(suite) if kind == "object" else drawn_benchmark("emoji_styles", seed, images=60, images_others=30)
        )
        return self.kept(
            f"{kind}-{name}-{method}-{seed}",
            lambda: self.score(suite, [concept], self.edit(concept, method, seed), seed),
        )

    def attacked(self, name: str, method: str, seed: int) -> Report:
        """Textual inversion on the edited model, on the un-edited one, and of an object that nobody erased."""
        concept = Concept.load(tasks_folder() / "concepts" / f"{name}.toml")
        suite = drawn_benchmark("emoji_objects", seed, images=20, images_general=1, images_others=1)
        suite = suite.model_copy(
            update={"objects": (name.replace("_", " "), *suite.targets_of([concept])[0].near, "castle")}
        )
        edit = self.edit(concept, method, seed)
        return self.kept(
            f"attack-{name}-{method}-{seed}", lambda: self.score(suite, [concept], edit, seed, inversion())
        )

    def score(
        self,
        suite: ImageBenchmark,
        concepts: Sequence[Concept],
        edit: Edit,
        seed: int,
        attack: TextualInversion | None = None,
    ) -> Report:
        means: dict[str, Any] = {} if attack is None else {"attack": attack, "examples": emoji.examples, "seed": seed}
        known = self.remembered.setdefault(seed, Unedited())
        return evaluate_images(self.model, suite, emoji.judges(), concepts, edit=edit, unedited=known, **means)

    def edit(self, concept: Concept, method: str, seed: int) -> Edit:
        folder = Path("runs/study/emoji") / f"{concept.name}-{method}-{seed}".replace(" ", "_")
        return edit_once(folder, lambda: eraser(method, concept.kind).erase(self.model, concept, seed=seed))[0]

    def kept(self, name: str, make: Callable[[], Report]) -> Report:
        return once(self.out / f"{name}.json", make)


def halved(suite: ImageBenchmark) -> ImageBenchmark:
    """Every second object, the ten erased ones and all their neighbours."""
    asked = {name for target in suite.targets for name in (target.name, *target.near)}
    kept = [
        name for number, name in enumerate(suite.objects) if number % 2 == 0 or name in asked or name == suite.unrelated
    ]
    return suite.model_copy(update={"objects": tuple(kept)})


def eraser(method: str, kind: str) -> Eraser:
    """Settings for the emoji model; UCE on styles and on many concepts has the published ones."""
    if method == "uce":
        return (
            UCE()
            if kind == "style"
            else UCE.from_settings(read_recipe(tasks_folder() / "recipes" / "emoji" / "uce.toml"))
        )
    settings = read_recipe(tasks_folder() / "recipes" / "emoji" / "esd.toml")
    return ESD.from_settings({**settings, "variant": method.removeprefix("esd-")})


def inversion() -> TextualInversion:
    return build(TextualInversion, read_recipe(tasks_folder() / "recipes" / "emoji" / "textual_inversion.toml"))


# -- tables and pictures ---------------------------------------------------------------------------------------------


def table(out: Path, kind: str, names: Iterable[str], seeds: Sequence[int]) -> list[str]:
    lines = ["| | " + " | ".join(metric for _, metric in COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for method in METHODS:
        paths = [out / f"{kind}-{name}-{method}-{seed}.json" for name in names for seed in seeds]
        reports = [Report.load(path) for path in paths if path.is_file()]
        if reports:
            if len(lines) == 2:
                before = [average(values(reports, *column, before=True)) for column in COLUMNS]
                lines.append(f"| un-edited | {' | '.join(before)} |")
            cells = [spread(values(reports, *column)) for column in COLUMNS]
            lines.append(f"| {method} ({len(reports)} runs) | {' | '.join(cells)} |")
    return lines


def by_object(out: Path, seeds: Sequence[int]) -> list[str]:
    """Acc_e and the share of Acc_s that is left, object by object."""
    lines = [
        "| object | " + " | ".join(f"{m}: Acc_e, Acc_g, Acc_s / before" for m in METHODS) + " |",
        "|---|" + "--:|" * len(METHODS),
    ]
    for name in OBJECTS:
        cells = []
        for method in METHODS:
            paths = [out / f"object-{name}-{method}-{seed}.json" for seed in seeds]
            reports = [Report.load(path) for path in paths if path.is_file()]
            cells.append(_cell(reports) if reports else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(reports: Sequence[Report]) -> str:
    erased = [average(values(reports, *column)) for column in (("target", "Acc_e"), ("general", "Acc_g"))]
    return ", ".join([*erased, average(kept_shares(reports))])


def sheets(study: Study, pictures: Path) -> None:
    """Before and after, from the same seeds."""
    for name, prompts in {
        "dog": [
            "a noto dog",
            "a twemoji dog",
            "an ink dog",
            "a puppy",
            "a pet that barks",
            "a noto cat",
            "a fluent wolf",
            "a twemoji fox",
            "an ink owl",
            "a fluent pizza",
            "a noto rocket",
        ],
        "ink": [
            "a house in ink style",
            "an ink guitar",
            "an ink owl",
            "a noto guitar",
            "a twemoji owl",
            "a fluent house",
        ],
    }.items():
        concept = Concept.load(tasks_folder() / "concepts" / f"{name}.toml")
        columns = {
            method.upper().replace("ESD-X", "ESD-x").replace("ESD-U", "ESD-u"): study.edit(concept, method, 0)
            for method in METHODS
        }
        contact_sheet(pictures / f"emoji-erased-{name}.png", study.model, columns, prompts, seed=7, steps=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["objects", "style", "attack", "tables"])
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS), choices=OBJECTS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/emoji"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    study, seeds = Study(arguments.out), arguments.seeds
    with shown():
        if arguments.part == "objects":
            for seed in seeds:
                for name in arguments.objects:
                    for method in arguments.methods:
                        study.single("object", name, method, seed)
        elif arguments.part == "style":
            for seed in seeds:
                for method in arguments.methods:
                    study.single("style", "ink", method, seed)
        elif arguments.part == "attack":
            for seed in seeds:
                for name in arguments.objects:
                    for method in arguments.methods:
                        study.attacked(name, method, seed)
        else:
            sheets(study, Path("docs/pictures"))
    if arguments.part == "tables":
        say = partial(Console(width=400).print, markup=False)
        for kind, names in (("object", OBJECTS), ("style", ("ink",))):
            say("\n".join(["", kind, "", *table(arguments.out, kind, names, seeds)]))
        say("\n".join(["", *by_object(arguments.out, seeds)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
