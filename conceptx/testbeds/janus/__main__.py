"""`python -m conceptx.testbeds.janus`: make the small Janus anew, measure it, draw its contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from conceptx.testbeds.janus import GUIDANCE, NUMBERS, load

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The Janus testbed: a small model that draws token by token, trained from scratch on four open emoji sets.",
)
Work = Annotated[Path, typer.Option(help="Drawings and checkpoints; a stopped run goes on here.")]
Icons = Annotated[Path | None, typer.Option(help="Folder with noto/icons.json …; default: fetched with npm.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the weights go.")],
    work: Work = Path("runs/janus"),
    icons: Icons = None,
    seed: int = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A hundredth of the steps: does it run?")] = False,
) -> None:
    """Make everything from the drawings: under three hours on two cores. Start it again after an interruption.

    Needs the package's build extra (resvg) and, unless --icons is given, npm. Prints what the quantiser
    keeps of pictures that no training saw.
    """
    from conceptx.progress import shown
    from conceptx.testbeds.emoji.drawings import rendered
    from conceptx.testbeds.janus.shipping import reconstruction, ship
    from conceptx.testbeds.janus.training import Schedule, Workshop

    with shown():
        drawings = rendered(work, icons)
        workshop = Workshop(drawings, work, Schedule.quick(seed) if quick else Schedule(seed=seed))
        typer.echo(json.dumps(reconstruction(workshop), indent=2))
        ship(workshop, out)
    typer.echo(f"{out}: the model and its processor")


@app.command()
def measure(
    source: Annotated[Path | None, typer.Option(help="The testbed's folder; default: the one that ships.")] = None,
    per_cell: Annotated[int, typer.Option(help="Pictures of each object in each style.")] = 5,
    guidance: float = GUIDANCE,
    picture: Annotated[Path | None, typer.Option(help="Also save the contact sheet here.")] = None,
) -> None:
    """How often the judge recognises object and style in what the model draws."""
    from conceptx.progress import shown
    from conceptx.testbeds.emoji import shipping
    from conceptx.testbeds.janus.shipping import draw

    asked = shipping.cells(NUMBERS, per_cell)
    with shown():
        images = draw(*load(source=source), asked.prompts, guidance=guidance)
    bar = shipping.measure(images, asked.objects, asked.styles, None)
    typer.echo(json.dumps({"guidance": guidance, **bar}, indent=2))
    if picture is not None:
        shipping.sheet(images, picture, per_cell)
        typer.echo(f"{picture}: one picture of every object in every style")


if __name__ == "__main__":
    app()
