"""The command that makes pairs of prompts and lets a judge filter them by what the model draws (ECGVF)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptx.cli.frame import Device, DTypeName, ModelName, app, judges_of, load_language_model, load_model


@app.command()
def pairs(
    model: ModelName,
    concept: Annotated[Path, typer.Option(help="A concept file, such as tasks/concepts/dog.toml.")],
    out: Annotated[Path, typer.Option(help="JSONL file for the pairs that are kept; name it as `pairs_file`.")],
    template: Annotated[
        list[str] | None, typer.Option(help='Such as "a {} in the snow"; may be repeated. Default: the concept\'s own.')
    ] = None,
    replacement: Annotated[
        list[str] | None, typer.Option(help="What stands in the concept's place; may be repeated. Default: its anchor.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option(help="A language model that writes pairs as well, e.g. smollm2.")
    ] = None,
    count: Annotated[int, typer.Option(help="Pairs that the language model writes.")] = 20,
    threshold: Annotated[float, typer.Option(help="Mean presence at which a prompt shows the concept.")] = 0.5,
    images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 4,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="Also save every pair with its scores.")] = None,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Make pairs of prompts, with the concept and without it, and keep those that differ in it for this model.

    Only the testbeds' judges are known here; others are given in Python (docs/ear.md).

    Example:

        conceptx pairs testbed:janus --concept tasks/concepts/dog.toml --out runs/dog.jsonl --template "a noto {}"
    """
    from rich.console import Console

    from conceptx.concept import Concept, pairs_of
    from conceptx.evaluation.visual_filter import presence, template_pairs, visual_filter, written_pairs
    from conceptx.models import LanguageModel
    from conceptx.progress import shown

    what = Concept.load(concept)
    others = replacement or ([what.anchor] if what.anchor else [])
    if template and not others:
        raise ValueError(f"Templates need a --replacement, since {what.name!r} has no anchor.")
    found = template_pairs(template, what.name, others) if template else list(pairs_of(what))
    present = presence(judges_of(model), what)
    host = load_model(model, dtype, device)
    if isinstance(host, LanguageModel):
        raise ValueError(f"{model} is a language model; pairs are filtered by what a model draws.")
    with shown():
        if writer is not None:
            found += written_pairs(load_language_model(writer, dtype, device), what, count, seed=seed)
        filtered = visual_filter(found, host.generate, present, threshold=threshold, images=images, seed=seed)
    Console().print(filtered.table())
    filtered.save(out)
    if json is not None:
        filtered.save_report(json)
    typer.echo(f"{out}: {len(filtered.kept)} pairs")
