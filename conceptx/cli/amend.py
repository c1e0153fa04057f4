"""The command that adds concepts to an edit of UCE and takes them out, and what edits say of names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conceptx.cli.frame import Device, DTypeName, app, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conceptx.concept import Concept
    from conceptx.edit import Edit
    from conceptx.eraser import Eraser
    from conceptx.methods.ledger import Ledger
    from conceptx.models import Model


@app.command()
def amend(
    folder: Annotated[Path, typer.Argument(help="A folder that `conceptx erase --ledger` wrote.")],
    model: Annotated[str | None, typer.Option(help="The pipeline; needed to add a concept.")] = None,
    add: Annotated[list[Path] | None, typer.Option(help="A concept file; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="The name of a concept; may be repeated.")] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Add concepts to an edit of UCE, or take some out, without solving it anew; the edit and its ledger are rewritten.

    The result is the edit that UCE makes of the concepts that are then in it. What is removed goes first.

    Examples:

        conceptx erase testbed:emoji --concept tasks/concepts/dog.toml --out runs/pets --ledger

        conceptx amend runs/pets --model testbed:emoji --add tasks/concepts/horse.toml --remove dog
    """
    from conceptx.concept import Concept
    from conceptx.methods.ledger import Ledger

    if not add and not remove:
        raise ValueError("Nothing was asked for; give --add or --remove.")
    if add and model is None:
        raise ValueError("--add needs --model, to encode the concept.")
    concepts = [Concept.load(path) for path in add or []]
    ledger = Ledger.load(folder)
    for name in remove or []:
        ledger = ledger.remove(name)
    host = None if model is None else load_model(model, dtype, device)
    if host is not None and concepts:
        ledger = ledger.add(host, concepts)  # type: ignore[arg-type]  # it refuses another kind of model
    edit = ledger.edit()
    edit.save(folder)
    ledger.save(folder)
    typer.echo(f"{folder}: {edit.describe()}")
    if host is not None:
        say_guarantees(host, edit, ledger.concepts)


def open_ledger(eraser: Eraser, host: Model, concept: Concept) -> Ledger:
    """Raises ValueError when the eraser is another than UCE."""
    from conceptx.methods import UCE

    if not isinstance(eraser, UCE):
        raise ValueError(f"Only UCE keeps a ledger, not {type(eraser).__name__}; leave --ledger out.")
    return eraser.open(host, concept)  # type: ignore[arg-type]


def say_guarantees(host: Model, edit: Edit, concept: Concept | Sequence[Concept]) -> None:
    """Print what an edit of a pipeline does to names; of a language model nothing."""
    from rich.console import Console

    from conceptx.models import DiffusionModel

    if isinstance(host, DiffusionModel):
        from conceptx.evaluation.guarantees import guarantees

        Console().print(guarantees(host, edit, concept).table())
