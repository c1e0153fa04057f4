"""Commands that score: evaluate, attack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conceptx.cli.frame import (
    Attacks,
    Device,
    DTypeName,
    ModelName,
    app,
    attack_of,
    judges_of,
    load_language_model,
    load_model,
)

if TYPE_CHECKING:
    from conceptx.edit import Edit
    from conceptx.evaluation.report import Report
    from conceptx.models import ImageModel


@app.command()
def evaluate(
    model: ModelName,
    edit: Annotated[Path | None, typer.Option(help="Folder of a saved edit; it is applied in memory.")] = None,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, with commas between them.")] = "",
    benchmark: Annotated[Path | None, typer.Option(help="A benchmark file instead: tasks/benchmarks/*.toml.")] = None,
    concept: Annotated[Path | None, typer.Option(help="The concept file that goes with the benchmark.")] = None,
    half: Annotated[
        str | None, typer.Option(help="test or dev (on which settings are chosen); default: test, of pictures both.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own lm-eval task files.")] = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="Also know the tasks that come with lm-eval.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task: a smoke test.")] = None,
    attack: Annotated[
        Path | None,
        typer.Option(help="Image models: recipe of a textual inversion that tries to bring the concept back."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Image models: save a contact sheet (PNG) here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Score a model; with --edit, before and after. Language models by lm-evaluation-harness, images by judges.

    Examples:

        conceptx evaluate smollm2 --edit runs/no-elements --tasks cx_chemical_elements,cx_capitals,cx_perplexity

        conceptx evaluate testbed:emoji --edit runs/no-dog --benchmark tasks/benchmarks/emoji_objects.toml
        --concept tasks/concepts/dog.toml --picture runs/no-dog.png
    """
    from rich.console import Console

    from conceptx.concept import Concept
    from conceptx.edit import Edit
    from conceptx.evaluation.benchmark import Benchmark
    from conceptx.evaluation.lm_eval import evaluate as score
    from conceptx.models import ImageModel
    from conceptx.progress import shown

    change = None if edit is None else Edit.load(edit)
    if half not in (None, "test", "dev"):
        raise ValueError(f"--half is test or dev, got {half!r}.")
    if half is not None and benchmark is None:
        raise ValueError("--half goes with --benchmark.")
    if (benchmark is None) != (concept is None):
        raise ValueError("--benchmark and --concept go together.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if bool(names) == (benchmark is not None):
        raise ValueError("Give --tasks or --benchmark.")
    what = None if concept is None else Concept.load(concept)
    host = load_model(model, dtype, device)
    with shown():
        if isinstance(host, ImageModel):
            report = _score_images(model, host, benchmark, what, change, attack, picture, half)
        elif benchmark is not None and what is not None:
            report = Benchmark.load(benchmark).run(host, what, edit=change, half=half or "test", limit=limit)
        else:
            report = score(host, names, edit=change, limit=limit, include_path=include_path, defaults=defaults)
    Console().print(report.table(model))
    if picture is not None:
        typer.echo(f"{picture}: contact sheet")
    if json is not None:
        report.save(json)


@app.command()
def attack(
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file: the attacker knows its texts and contexts.")],
    benchmark: Annotated[Path, typer.Option(help="Its benchmark: the attacker knows the dev half of the questions.")],
    attack: Attacks = None,
    edit: Annotated[Path | None, typer.Option(help="Folder of a saved edit; it is applied in memory.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="An unrelated concept, for the same effort without knowledge.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task: a smoke test.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Try to bring a concept back into a language model, and score what came back on questions that nobody saw.

    Attacks: relearning, soft_prompt, discrete_prompt, in_context, quantisation (docs/attacks.md).

    Example:

        conceptx attack smollm2 --edit runs/no-elements --concept tasks/concepts/chemical_elements.toml
        --benchmark tasks/benchmarks/chemical_elements.toml
        --attack relearning=tasks/recipes/smollm2/relearning.toml --attack in_context
    """
    from rich.console import Console

    from conceptx.concept import Concept
    from conceptx.edit import Edit
    from conceptx.evaluation.attacked import goal_of
    from conceptx.evaluation.benchmark import Benchmark
    from conceptx.evaluation.lm_eval import evaluate as score
    from conceptx.progress import shown

    attacks = [attack_of(text)[1] for text in attack or []]
    if not attacks:
        raise ValueError("Give --attack at least once.")
    change = None if edit is None else Edit.load(edit)
    what, suite = Concept.load(concept), Benchmark.load(benchmark)
    other = None if control is None else goal_of(Concept.load(control))
    host = load_language_model(model, dtype, device)
    with shown():
        report = score(
            host,
            [*suite.target, *suite.open],
            edit=change,
            attacks=attacks,
            goal=goal_of(what, suite),
            control=other,
            seed=seed,
            limit=limit,
        )
    Console().print(report.table(model))
    if json is not None:
        report.save(json)


def _score_images(
    name: str,
    model: ImageModel,
    benchmark: Path | None,
    concept: Any,
    edit: Edit | None,
    attack: Path | None,
    picture: Path | None,
    half: str | None,
) -> Report:
    """The columns of an image benchmark."""
    from conceptx.attacks.textual_inversion import TextualInversion
    from conceptx.evaluation.contact_sheet import contact_sheet
    from conceptx.evaluation.image_benchmark import ImageBenchmark
    from conceptx.evaluation.images import evaluate_images
    from conceptx.settings import build, read_recipe
    from conceptx.testbeds import emoji

    judges = judges_of(name)
    if benchmark is None:
        raise ValueError("An image model is scored with --benchmark and --concept.")
    suite = ImageBenchmark.load(benchmark)
    suite = suite if half is None else suite.half(half)
    means: dict[str, Any] = {}
    if attack is not None:
        means = {"attack": build(TextualInversion, read_recipe(attack)), "examples": emoji.examples}
    report = evaluate_images(model, suite, judges, concept, edit=edit, **means)
    if picture is not None:
        prompts = suite.samples([concept])
        columns = {} if edit is None else {edit.provenance[0]["method"]: edit}
        contact_sheet(picture, model, columns, prompts, **suite.sampler)
    return report
