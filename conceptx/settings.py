"""Settings from JSON or TOML: one checked way from a mapping to a frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def build(kind: type[T], settings: Mapping[str, Any]) -> T:
    """The dataclass with these settings, checked and converted (a list becomes a tuple, and so on).

    Raises ValueError that names the settings there are when one is unknown or of the wrong kind.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        raise ValueError(f"{kind.__name__}{' ' + where if where else ''}: {message}.") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises FileNotFoundError, or ValueError when it is not TOML."""
    import tomllib

    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from None
