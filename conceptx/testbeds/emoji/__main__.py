"""`python -m conceptx.testbeds.emoji`: make the testbed anew, measure it, draw its contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The emoji testbed: a small Stable Diffusion, trained from scratch on four open emoji sets.",
)
Folder = Annotated[Path | None, typer.Option(help="The testbed's folder; default: the one that ships.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the weights go.")],
    work: Annotated[Path, typer.Option(help="Drawings and checkpoints; a stopped run goes on here.")] = Path(
        "runs/emoji"
    ),
    icons: Annotated[
        Path | None, typer.Option(help="Folder with noto/icons.json …; default: fetched with npm.")
    ] = None,
    seed: int = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A hundredth of the steps: does it run?")] = False,
) -> None:
    """Make everything from the drawings: under three hours on two cores. Start it again after an interruption.

    Needs the package's build extra (resvg) and, unless --icons is given, npm.
    """
    from conceptx.progress import shown
    from conceptx.testbeds.emoji.drawings import rendered
    from conceptx.testbeds.emoji.shipping import ship
    from conceptx.testbeds.emoji.training import Schedule, Workshop

    with shown():
        workshop = Workshop(rendered(work, icons), work, Schedule.quick(seed) if quick else Schedule(seed=seed))
        ship(workshop, out)
    typer.echo(f"{out}: the pipeline, the second denoiser, the judges and the examples")


@app.command()
def measure(
    source: Folder = None,
    unet: Annotated[str, typer.Option(help="a or b.")] = "a",
    per_cell: Annotated[int, typer.Option(help="Pictures of each object in each style.")] = 5,
    steps: int = 20,
    guidance: float = 3.0,
    picture: Annotated[Path | None, typer.Option(help="Also save the contact sheet here.")] = None,
) -> None:
    """How often the judge recognises object and style in what the pipeline draws."""
    from conceptx.progress import shown
    from conceptx.testbeds.emoji import shipping

    with shown():
        images, objects, styles = shipping.draw_all(unet, source, per_cell, steps, guidance)
    bar = shipping.measure(images, objects, styles, source)
    typer.echo(json.dumps({"unet": unet, "steps": steps, "guidance": guidance, **bar}, indent=2))
    if picture is not None:
        shipping.sheet(images, picture, per_cell)
        typer.echo(f"{picture}: one picture of every object in every style")


@app.command()
def judge(
    source: Folder = None,
    icons: Annotated[
        Path | None, typer.Option(help="Folder with noto/icons.json …; default: fetched with npm.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where fetched drawings go.")] = Path("runs/emoji"),
) -> None:
    """How often the judge is right on real drawings that no training saw."""
    from conceptx.progress import shown
    from conceptx.testbeds.emoji.drawings import rendered
    from conceptx.testbeds.emoji.shipping import judge_accuracy

    with shown():
        found = judge_accuracy(rendered(work, icons), source)
    typer.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    app()
