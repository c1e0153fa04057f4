"""The command line. Thin: it reads files, calls the library, shows progress, and writes what comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from conceptx.eraser import Eraser
    from conceptx.models import LanguageModel

app = typer.Typer(
    name="conceptx",
    help="Remove a concept from the model you already have.\n\n"
    "A model is a local folder, a hub name, or [bold]smollm2[/bold], which comes with an installed package.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub name, or smollm2.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto (as in the checkpoint).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: cuda where there is one.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the edit, the tables and the pictures go.")] = Path("runs/demo"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as torch decides.")] = 0,
) -> None:
    """The main job on real input: erase a concept from a real language model, and gender from real word vectors.

    Needs no network and no GPU; takes a few minutes on two cores.
    """
    from conceptx.demo.main import run

    run(out, threads)


@app.command()
def erase(
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file, such as tasks/concepts/capitals.toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit. A stopped ELM run goes on when started again.")],
    method: Annotated[str, typer.Option(help="See `conceptx methods`.")] = "elm",
    recipe: Annotated[Path | None, typer.Option(help="TOML file with settings of the method.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same edit.")] = 0,
    peft: Annotated[Path | None, typer.Option(help="Also write a LoRA adapter for plain peft here.")] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Also write the merged model for plain transformers here.")
    ] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Make an edit that takes a concept out of a model, and save it.

    Example:

        conceptx erase smollm2 --concept tasks/concepts/chemical_elements.toml
        --recipe tasks/recipes/elm_smollm2.toml --out runs/no-elements --peft runs/no-elements-lora
    """
    import inspect
    import os
    import shutil

    from conceptx.concept import Concept
    from conceptx.progress import shown

    eraser = _eraser(method, recipe, setting or [])
    what = Concept.load(concept)
    host = _load(model, dtype, device)
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
    if merged is not None:
        host.save_pretrained(merged, edit)
        typer.echo(f"{merged}: merged model for transformers")


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
    json: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Score a model with lm-evaluation-harness; with --edit, before and after.

    Example:

        conceptx evaluate smollm2 --edit runs/no-elements --tasks cx_chemical_elements,cx_capitals,cx_perplexity
    """
    from rich.console import Console

    from conceptx.concept import Concept
    from conceptx.edit import Edit
    from conceptx.evaluation.benchmark import Benchmark
    from conceptx.evaluation.lm_eval import evaluate as score
    from conceptx.progress import shown

    change = None if edit is None else Edit.load(edit)
    if half not in ("test", "dev"):
        raise ValueError(f"--half is test or dev, got {half!r}.")
    if (benchmark is None) != (concept is None):
        raise ValueError("--benchmark and --concept go together.")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if bool(names) == (benchmark is not None):
        raise ValueError("Give --tasks or --benchmark.")
    host = _load(model, dtype, device)
    with shown():
        if benchmark is not None and concept is not None:
            suite, what = Benchmark.load(benchmark), Concept.load(concept)
            report = suite.run(host, what, edit=change, half=half, limit=limit)
        else:
            report = score(host, names, edit=change, limit=limit, include_path=include_path, defaults=defaults)
    Console().print(report.table(model))
    if json is not None:
        report.save(json)


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
    import tomllib

    from conceptx import methods as registry

    names = {module: name for name, module in registry.MODULES.items()}
    if method not in names:
        raise ValueError(f"Unknown method {method!r}; available: {', '.join(sorted(names))}.")
    if recipe is not None and not recipe.is_file():
        raise FileNotFoundError(f"There is no recipe {recipe}.")
    try:
        values = tomllib.loads(recipe.read_text(encoding="utf-8")) if recipe else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} is not a TOML file: {error}.") from None
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


def _load(model: str, dtype: str, device: str) -> LanguageModel:
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
