"""Commands that make edits: demo, erase, features, methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conceptx.cli.amend import open_ledger, say_guarantees
from conceptx.cli.frame import (
    Device,
    DTypeName,
    ModelName,
    Recipe,
    Settings,
    app,
    eraser_and_sites,
    eraser_of,
    load_language_model,
    load_model,
)

if TYPE_CHECKING:
    from conceptx.models import Model


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
        str | None,
        typer.Option(
            help="See `conceptx methods`; default: elm for a language model, ear for a Janus, uce for a pipeline."
        ),
    ] = None,
    recipe: Recipe = None,
    setting: Settings = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same edit.")] = 0,
    peft: Annotated[Path | None, typer.Option(help="Also write a LoRA adapter for plain peft here.")] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Also write a LoRA file for plain diffusers here (pipe.load_lora_weights).")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Also write the merged model for plain transformers or diffusers here.")
    ] = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="UCE: also write what it was solved from, for `conceptx amend`.")
    ] = False,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Make an edit that takes a concept out of a model, and save it. Of a pipeline, say what it does to names.

    Examples:

        conceptx erase smollm2 --concept tasks/concepts/chemical_elements.toml
        --recipe tasks/recipes/smollm2/elm.toml --out runs/no-elements --peft runs/no-elements-lora

        conceptx erase testbed:emoji --concept tasks/concepts/dog.toml --out runs/no-dog --lora runs/no-dog.safetensors

        conceptx erase testbed:janus --concept tasks/concepts/dog.toml --method rlace
        --set 'sites=["prompt.layers.0.attention_input"]' --out runs/no-dog-janus
    """
    import inspect
    import os
    import shutil

    from conceptx.concept import Concept
    from conceptx.progress import shown

    what = Concept.load(concept)
    if method is not None:
        eraser, sites = eraser_and_sites(method, recipe, setting or [])  # wrong settings are said before a model loads
    host = load_model(model, dtype, device)
    if method is None:
        eraser, sites = eraser_and_sites(_usual_method(host), recipe, setting or [])
    resumes = "checkpoint" in inspect.signature(eraser.erase).parameters
    more: dict[str, Any] = {"checkpoint": out / "checkpoint"} if resumes else {}
    if sites is not None:
        more["sites"] = sites
    opened = open_ledger(eraser, host, what) if ledger else None
    with shown():
        edit = eraser.erase(host, what, seed=seed, **more) if opened is None else opened.edit(seed=seed)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one of several processes; the first one writes
    edit.save(out)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    typer.echo(f"{out}: {edit.describe()}")
    if opened is not None:
        opened.save(out)
        typer.echo(f"{out / 'ledger.json'}: the ledger, for conceptx amend")
    say_guarantees(host, edit, what)
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
def features(
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file.")],
    recipe: Recipe = None,
    setting: Settings = None,
    most: Annotated[int, typer.Option(help="How many candidates are shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the texts that are looked at.")] = 0,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """The features that PISCES would edit, with what each one does, and why the others were left out.

    Leave one out by --set 'veto=["24/1<"]', or name them all by --set 'features=["6/0"]'.

    Example:

        conceptx features smollm2 --concept tasks/concepts/capitals.toml --set threshold=0.8
    """
    from rich.console import Console

    from conceptx.concept import Concept
    from conceptx.methods import PISCES
    from conceptx.progress import shown

    what, eraser = Concept.load(concept), eraser_of("pisces", recipe, setting or [])
    assert isinstance(eraser, PISCES)
    host = load_language_model(model, dtype, device)
    with shown():
        found = eraser.find(host, what, seed=seed)
    Console().print(found.table(most))
    typer.echo(f"Together: forgotten {found.forgotten:.2f}, harm {found.harm:+.3f}")


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


def _usual_method(model: Model) -> str:
    return {"LanguageModel": "elm", "ARImageModel": "ear"}.get(type(model).__name__, "uce")
