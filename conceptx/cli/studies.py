"""Commands that run many edits: tune, compare, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conceptx.cli.frame import (
    Attacks,
    Device,
    DTypeName,
    ModelName,
    Recipe,
    app,
    attack_of,
    eraser_and_sites,
    eraser_of,
    judges_of,
    load_language_model,
    load_model,
)

if TYPE_CHECKING:
    from conceptx.comparing import Contender, Subject
    from conceptx.concept import Concept
    from conceptx.evaluation.benchmark import Benchmark

Method = Annotated[str, typer.Argument(metavar="METHOD", help="See `conceptx methods`.")]


@app.command()
def tune(
    method: Method,
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file.")],
    benchmark: Annotated[Path, typer.Option(help="The benchmark file that goes with it.")],
    out: Annotated[Path, typer.Option(help="Folder for trials, picture and best.toml. The same command goes on.")],
    budget: Annotated[int, typer.Option(help="How many settings are tried.")] = 20,
    recipe: Recipe = None,
    field: Annotated[list[str] | None, typer.Option(help="Search this setting only; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search and of the edits.")] = 0,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Find the strength of a method: removal against retention and fluency, chosen on one half of the benchmark.

    Tries the published settings, those of --recipe, and then what Optuna proposes; draws the trade-off, and reports the
    best settings on the other half (of the questions; of the prompt forms of an image model).

    Examples:

        conceptx tune pisces smollm2 --concept tasks/concepts/capitals.toml
        --benchmark tasks/benchmarks/capitals.toml --budget 12 --out runs/tune-capitals

        conceptx tune ear testbed:janus --concept tasks/concepts/dog.toml --recipe tasks/recipes/janus/ear.toml
        --benchmark tasks/benchmarks/janus_objects.toml --field learning_rate --field threshold --out runs/tune-dog
    """
    from rich.console import Console

    from conceptx.concept import Concept
    from conceptx.evaluation.benchmark import Benchmark
    from conceptx.evaluation.image_benchmark import ImageBenchmark
    from conceptx.models import ImageModel
    from conceptx.progress import shown
    from conceptx.settings import read_recipe
    from conceptx.tuning import tune as search

    kind = type(eraser_of(method, None, []))
    start = None if recipe is None else read_recipe(recipe)
    what = Concept.load(concept)
    host = load_model(model, dtype, device)
    draws = isinstance(host, ImageModel)
    suite = ImageBenchmark.load(benchmark) if draws else Benchmark.load(benchmark)
    judges = judges_of(model) if draws else None
    with shown():
        tuning = search(
            kind, host, what, suite, judges=judges, budget=budget, seed=seed, folder=out, start=start, fields=field
        )
    Console().print(tuning.table())
    tuning.draw(out / "trade-off.png")
    typer.echo(f"{out / 'trade-off.png'}: the trade-off\n{out / 'best.toml'}: the recipe")


@app.command()
def compare(
    model: ModelName,
    concepts: Annotated[str, typer.Option(help="Names of files in tasks/concepts (or paths), with commas between.")],
    methods: Annotated[str, typer.Option(help="Names of methods, with commas between them.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the cells, the table and the picture. The same command goes on.")
    ],
    seeds: Annotated[str, typer.Option(help="With commas between them.")] = "0,1,2",
    recipes: Annotated[
        Path | None, typer.Option(help="Folder with METHOD.toml, or CONCEPT/METHOD.toml, where not as published.")
    ] = None,
    attack: Attacks = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task: a smoke test.")] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Go on alone; `conceptx report` shows what is done.")
    ] = False,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Methods against each other: every concept, method and seed, before and after attacks; one table, one picture.

    Example:

        conceptx compare smollm2 --concepts chemical_elements,capitals --methods elm,pisces,rmu,leace
        --recipes tasks/recipes/smollm2 --attack relearning --out runs/compare --background
    """
    from conceptx.comparing import compare as run
    from conceptx.progress import shown

    pairs = {name: _subject(name, concepts) for name in _names(concepts)}
    attacks = dict(map(attack_of, attack or []))
    numbers = [int(text) for text in _names(seeds)]
    chosen = {name: [_contender(method, name, recipes) for method in _names(methods)] for name in pairs}
    if background:
        return _detached(out)
    host = load_language_model(model, dtype, device)
    with shown():
        for name, contenders in chosen.items():
            run(host, {name: pairs[name]}, contenders, seeds=numbers, folder=out, attacks=attacks, limit=limit)
    return report(out)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Folder of a comparison, or a report file.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a page.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Where the picture of a comparison goes.")] = None,
) -> None:
    """Print what a comparison has found so far (and draw it), or a saved report.

    Examples:

        conceptx report runs/compare --picture runs/compare.png

        conceptx report runs/no-elements.json
    """
    from rich.console import Console

    from conceptx.comparing import Comparison
    from conceptx.evaluation.report import Report

    if source.is_file():
        Console().print(Report.load(source).table(str(source)))
        return
    comparison = Comparison.load(source)
    for subject in comparison.subjects:
        if markdown:
            typer.echo(comparison.markdown(subject) + "\n")
        else:
            Console().print(comparison.table(subject))
    path = picture or source / "comparison.png"
    comparison.draw(path)
    typer.echo(f"{path}: the picture")


def _names(text: str) -> list[str]:
    """Raises ValueError when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"Expected names with commas between them, got {text!r}.")
    return names


def _subject(name: str, every: str) -> Subject:
    """A concept file with the benchmark of the same name beside it; the control is the next of the list."""
    from conceptx.comparing import Subject
    from conceptx.evaluation.attacked import goal_of

    names = _names(every)
    other = names[(names.index(name) + 1) % len(names)]
    control = None if other == name else goal_of(*_measured(other))
    return Subject(*_measured(name), control)


def _measured(name: str) -> tuple[Concept, Benchmark]:
    """The concept file of that name, or at that path, and its benchmark."""
    from conceptx.concept import Concept
    from conceptx.evaluation.benchmark import Benchmark
    from conceptx.places import tasks_folder

    path = Path(name) if name.endswith(".toml") else tasks_folder() / "concepts" / f"{name}.toml"
    return Concept.load(path), Benchmark.load(path.parents[1] / "benchmarks" / path.name)


def _contender(method: str, concept: str, recipes: Path | None) -> Contender:
    """With the concept's own recipe, the method's, or the published settings."""
    from conceptx.comparing import Contender

    concept = Path(concept).stem
    places = [] if recipes is None else [recipes / concept / f"{method}.toml", recipes / f"{method}.toml"]
    return Contender(method, *eraser_and_sites(method, next((path for path in places if path.is_file()), None), []))


def _detached(out: Path) -> None:
    """Start the same command again in a session of its own, with its output in a file."""
    import subprocess

    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "conceptx", *(a for a in sys.argv[1:] if a != "--background")]
    with (out / "compare.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    typer.echo(f"Running as process {process.pid}; log: {out / 'compare.log'}; so far: conceptx report {out}")
