"""Commands on dictionaries: dictionary train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptx.cli.frame import Device, DTypeName, ModelName, Settings, app, load_model, setting_of

dictionary = typer.Typer(
    no_args_is_help=True, help="Dictionaries of features (sparse autoencoders) for PISCES and ItD."
)
app.add_typer(dictionary, name="dictionary")


@dictionary.command()
def train(
    model: ModelName,
    site: Annotated[str, typer.Option(help="Where: layers.6.mlp_output or text_encoder.layers.0, for example.")],
    texts: Annotated[
        list[Path], typer.Option(help='Files of texts: JSONL of {"text": ...}, or a text a line; or testbed:emoji.')
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the dictionary. A stopped training goes on when started again.")
    ],
    setting: Settings = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same dictionary.")] = 0,
    dtype: DTypeName = "auto",
    device: Device = "auto",
) -> None:
    """Train a sparse autoencoder with sae-lens on what the model computes at a site.

    Example:

        conceptx dictionary train smollm2 --site layers.6.mlp_output --out runs/sae-6
        --texts tasks/concepts/corpora/capitals.forget.jsonl --texts tasks/concepts/corpora/capitals.retain.jsonl

        conceptx dictionary train testbed:emoji --site text_encoder.layers.0 --texts testbed:emoji --out runs/emoji-sae
    """
    import shutil
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from conceptx.dictionaries import SAETraining, read_texts, train_dictionary
    from conceptx.progress import shown
    from conceptx.settings import build

    values = {name: value for text in setting or [] for name, value in setting_of(text).items()}
    settings = build(SAETraining, values)
    corpus = [text for path in texts for text in read_texts(path)]
    host = load_model(model, dtype, device)
    with shown():
        trained = train_dictionary(host, site, corpus, settings, seed=seed, folder=out / "checkpoint")
    trained.save(out)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    table = Table("", "", box=None, show_header=False)
    for name, value in asdict(trained.report).items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    typer.echo(f"{out}: dictionary of {trained.dictionary.width} features")
