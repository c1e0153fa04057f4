"""The command line. Thin: it reads files, calls the library, shows progress, and writes what comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from conceptx.edit import Edit
    from conceptx.eraser import Eraser
    from conceptx.evaluation.report import Report
    from conceptx.models import DiffusionModel, Model

app = typer.Typer(
    name="conceptx",
    help="Remove a concept from the model you already have.\n\n"
    "A model is a local folder or a hub name (a transformers language model or a diffusers text-to-image pipeline), "
    "[bold]smollm2[/bold], which an installed package brings, or [bold]testbed:emoji[/bold], which comes with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub name, smollm2 or testbed:emoji.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto (as in the checkpoint).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: cuda where there is one.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the edit, the tables and the pictures go.")] = Path("runs/demo"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch decides.")] = 0,
) -> None:
    """The main job on real input: erase concepts from a language model, an image model and word vectors.

    Needs no network and no GPU; takes a few minutes on two cores.
    """
    from conceptx.demo.main import run

    run(out, threads)


@app.command()
def erase(
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file, such as tasks/concepts/capitals.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit. A stopped training goes on when started again.")],
    method: Annotated[
        str | None, typer.Option(help="See `conceptx methods`; default: elm for language models, uce for images.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with settings of the method.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same edit.")] = 0,
    peft: Annotated[Path | None, typer.Option(help="Also write a LoRA adapter for plain peft here.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Also write a LoRA file for plain diffusers here (pipe.load_lora_weights).")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Also write the merged model for plain transformers or diffusers here.")
    ] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Make an edit that takes a concept out of a model, and save it.

    Examples:

        conceptx erase smollm2 --concept tasks/concepts/chemical_elements.toml
        --recipe tasks/recipes/elm_smollm2.toml --out runs/no-elements --peft runs/no-elements-lora

        conceptx erase testbed:emoji --concept tasks/concepts/dog.toml --out runs/no-dog --lora runs/no-dog.safetensors
    """
    import inspect
    import os
    import shutil

    from conceptx.concept import Concept
    from conceptx.progress import shown

    what = Concept.load(concept)
    if method is not None:
        eraser = _eraser(method, recipe, setting or [])  # a wrong setting is said before a model is loaded
    host = _load(model, dtype, device)
    if method is None:
        eraser = _eraser(_usual_method(host), recipe, setting or [])
    resumes = "checkpoint" in inspect.signature(eraser.erase).parameters
    resume: dict[str, Any] = {"checkpoint": out / "checkpoint"} if resumes else {}
    with shown():
        edit = eraser.erase(host, what, seed=seed, **resume)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one of several processes; the first one writes
    edit.save(out)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    typer.echo(f"{out}: {edit.describe()}")
    if peft is not None:
        edit.fold(host).export_peft(peft, host)
        typer.echo(f"{peft}: LoRA adapter for peft")
    if lora is not None:
        edit.fold(host).export_diffusers_lora(lora, host)
        typer.echo(f"{lora}: LoRA file for diffusers")
    if merged is not None:
        host.save_pretrained(merged, edit)
        typer.echo(f"{merged}: merged model")


@app.command()
def evaluate(
    model: ModelName,
    edit: Annotated[Path | None, typer.Option(help="Folder of a saved edit; it is applied in memory.")] = None,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, with commas between them.")] = "",
    benchmark: Annotated[Path | None, typer.Option(help="A benchmark file instead: tasks/benchmarks/*.toml.")] = None,
    concept: Annotated[Path | None, typer.Option(help="The concept file that goes with the benchmark.")] = None,
    half: Annotated[str, typer.Option(help="test, or dev: the half on which settings are chosen.")] = "test",
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
    from conceptx.models import DiffusionModel
    from conceptx.progress import shown

    change = None if edit is None else Edit.load(edit)
    if half not in ("test", "dev"):
        raise ValueError(f"--half is test or dev, got {half!r}.")
    if (benchmark is None) != (concept is None):
        raise ValueError("--benchmark and --concept go together.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if bool(names) == (benchmark is not None):
        raise ValueError("Give --tasks or --benchmark.")
    what = None if concept is None else Concept.load(concept)
    host = _load(model, dtype, device)
    with shown():
        if isinstance(host, DiffusionModel):
            report = _score_images(model, host, benchmark, what, change, attack, picture)
        elif benchmark is not None and what is not None:
            report = Benchmark.load(benchmark).run(host, what, edit=change, half=half, limit=limit)
        else:
            report = score(host, names, edit=change, limit=limit, include_path=include_path, defaults=defaults)
    Console().print(report.table(model))
    if picture is not None:
        typer.echo(f"{picture}: contact sheet")
    if json is not None:
        report.save(json)


def _score_images(
    name: str,
    model: DiffusionModel,
    benchmark: Path | None,
    concept: Any,
    edit: Edit | None,
    attack: Path | None,
    picture: Path | None,
) -> Report:
    """The columns of an image benchmark. Only the testbed's judges are known here; others are given in Python."""
    from conceptx.attacks.textual_inversion import TextualInversion
    from conceptx.evaluation.contact_sheet import contact_sheet
    from conceptx.evaluation.image_benchmark import ImageBenchmark
    from conceptx.evaluation.images import evaluate_images
    from conceptx.settings import build, read_recipe
    from conceptx.testbeds import emoji

    if name != emoji.NAME:
        raise ValueError(f"The command line knows judges for {emoji.NAME} only; see docs/image-benchmarks.md.")
    if benchmark is None:
        raise ValueError("An image model is scored with --benchmark and --concept.")
    suite = ImageBenchmark.load(benchmark)
    means: dict[str, Any] = {}
    if attack is not None:
        means = {"attack": build(TextualInversion, read_recipe(attack)), "examples": emoji.examples}
    report = evaluate_images(model, suite, emoji.judges(), concept, edit=edit, **means)
    if picture is not None:
        prompts = suite.samples([concept])
        columns = {} if edit is None else {edit.provenance[0]["method"]: edit}
        contact_sheet(picture, model, columns, prompts, steps=suite.steps, guidance=suite.guidance)
    return report


@app.command()
def methods() -> None:
    """The methods, what each one works on, and their settings."""
    from rich.console import Console
    from rich.table import Table

    from conceptx.capabilities import capabilities

    table = Table(title="Methods", title_justify="left")
    for column in ("--method", "class", "works on", "settings (defaults)", "source"):
        table.add_column(column)
    for row in capabilities():
        table.add_row(row.module, row.name, "\n".join(row.hosts), ", ".join(row.settings), row.source)
    Console().print(table)


def _eraser(method: str, recipe: Path | None, settings: list[str]) -> Eraser:
    """The eraser with settings from a file, then from the command line."""
    from conceptx import methods as registry
    from conceptx.settings import read_recipe

    names = {module: name for name, module in registry.MODULES.items()}
    if method not in names:
        raise ValueError(f"Unknown method {method!r}; available: {', '.join(sorted(names))}.")
    values = {} if recipe is None else read_recipe(recipe)
    for text in settings:
        values |= _setting(text)
    return getattr(registry, names[method]).from_settings(values)


def _setting(text: str) -> dict[str, Any]:
    """NAME=VALUE, the value as in TOML; a bare word is a text, `none` is None."""
    import tomllib

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}.")
    if value.strip().lower() == "none":
        return {name.strip(): None}
    try:
        return {name.strip(): tomllib.loads(f"value = {value}")["value"]}
    except tomllib.TOMLDecodeError:
        return {name.strip(): value.strip()}


def _usual_method(model: Model) -> str:
    from conceptx.models import LanguageModel

    return "elm" if isinstance(model, LanguageModel) else "uce"


def _load(model: str, dtype: str, device: str) -> Model:
    import torch

    from conceptx.models import load
    from conceptx.progress import only_ours

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
    if dtype not in dtypes:
        raise ValueError(f"Unknown dtype {dtype!r}; available: {', '.join(dtypes)}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    only_ours()
    return load(model, dtype=dtypes[dtype], device=device)


def main() -> None:
    """Run the command line; what a user can mend is one sentence, not a traceback."""
    try:
        app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        typer.secho(f"conceptx: {text}", fg="red", err=True)
        sys.exit(2)
