"""The command line's frame: the program, the options that several commands have, and the readers behind them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from conceptx.eraser import Eraser
    from conceptx.evaluation.image_columns import Judges
    from conceptx.models import LanguageModel, Model

app = typer.Typer(
    name="conceptx",
    help="Remove a concept from the model you already have.\n\n"
    "A model is a local folder or a hub name (a transformers language model, a diffusers text-to-image pipeline, or a "
    "Janus), [bold]smollm2[/bold], which an installed package brings, or [bold]testbed:emoji[/bold] or "
    "[bold]testbed:janus[/bold], which come with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Local folder, hub name, smollm2, testbed:emoji or testbed:janus.")
]
DTypeName = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto (as in the checkpoint).")]
Recipe = Annotated[Path | None, typer.Option(help="TOML file with settings of the method.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting; may be repeated.")
]
Attacks = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=FILE]", help="An attack, with a TOML file of its settings; may be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: cuda where there is one.")]


def eraser_of(method: str, recipe: Path | None, settings: list[str]) -> Eraser:
    """The eraser with settings from a file, then from the command line."""
    return eraser_and_sites(method, recipe, settings)[0]


def eraser_and_sites(method: str, recipe: Path | None, settings: list[str]) -> tuple[Eraser, tuple[str, ...] | None]:
    """The eraser, and where a method on vectors shall act: `sites` of a recipe is an argument, no setting."""
    from conceptx import methods as registry
    from conceptx.eraser import VectorEraser
    from conceptx.settings import read_recipe

    names = {module: name for name, module in registry.MODULES.items()}
    if method not in names:
        raise ValueError(f"Unknown method {method!r}; available: {', '.join(sorted(names))}.")
    kind = getattr(registry, names[method])
    values = {} if recipe is None else read_recipe(recipe)
    for text in settings:
        values |= setting_of(text)
    sites = values.pop("sites", None) if issubclass(kind, VectorEraser) else None
    return kind.from_settings(values), None if sites is None else tuple(sites)


def setting_of(text: str) -> dict[str, Any]:
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


def attack_of(text: str) -> tuple[str, Any]:
    """NAME, or NAME=FILE with its settings. Raises ValueError that names the attacks there are."""
    from conceptx import attacks
    from conceptx.settings import build, read_recipe

    name, _, file = text.partition("=")
    if name not in attacks.LANGUAGE:
        raise ValueError(f"Unknown attack {name!r}; available: {', '.join(attacks.LANGUAGE)}.")
    return name, build(getattr(attacks, attacks.LANGUAGE[name]), read_recipe(Path(file)) if file else {})


def load_model(model: str, dtype: str, device: str) -> Model:
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


def load_language_model(model: str, dtype: str, device: str) -> LanguageModel:
    """Raises ValueError for another kind of model."""
    from conceptx.models import LanguageModel

    host = load_model(model, dtype, device)
    if not isinstance(host, LanguageModel):
        raise ValueError(f"{model} is a {type(host).__name__}; this command works on language models.")
    return host


def judges_of(model: str) -> Judges:
    """Raises ValueError for a model whose pictures nobody here can judge."""
    from conceptx.testbeds import emoji, janus

    if model not in (emoji.NAME, janus.NAME):
        raise ValueError(
            f"The command line knows judges for {emoji.NAME} and {janus.NAME} only; see docs/image-benchmarks.md."
        )
    return emoji.judges()


def main() -> None:
    """Run the command line; what a user can mend is one sentence, not a traceback."""
    try:
        app()
    except (ValueError, KeyError, OSError, ImportError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        typer.secho(f"conceptx: {text}", fg="red", err=True)
        sys.exit(2)
