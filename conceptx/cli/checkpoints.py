"""Commands on model folders: fold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptx.cli.frame import app


@app.command()
def fold(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a model, in safetensors.")],
    edit: Annotated[Path, typer.Option(help="Folder of a saved edit that was made for this model.")],
    out: Annotated[Path, typer.Option(help="The new folder. It is there when it is complete, or not at all.")],
) -> None:
    """Put an edit into the weights of a model folder on the disk, without loading the model.

    CHECKPOINT is a folder of transformers (a language model) or of diffusers, in one file or in many. The new folder
    is an ordinary model for plain transformers or diffusers, in the same precision, with every other file copied. It
    takes as much disk as the old one, and hardly any memory. CHECKPOINT itself is not touched.

    Examples:

        conceptx fold models/llama-8b --edit runs/no-elements --out models/llama-8b-no-elements

        conceptx fold models/sdxl --edit runs/no-dog --out models/sdxl-no-dog
    """
    import time

    from conceptx.edit import Edit
    from conceptx.models.checkpoints import fold_checkpoint
    from conceptx.progress import only_ours, shown

    only_ours()
    start, change = time.perf_counter(), Edit.load(edit)
    with shown():
        done = fold_checkpoint(checkpoint, change, out)
    typer.echo(
        f"{out}: {done.weights} of {done.tensors} weights changed, {done.size / 1e6:,.1f} MB written in "
        f"{time.perf_counter() - start:.1f} s, peak memory of the process {_peak() / 1e6:,.0f} MB"
    )


def _peak() -> int:
    """Bytes: the largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # what `resource` says on Linux counts the program that started this one, too
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
