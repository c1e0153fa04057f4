"""Settings from JSON or TOML: one checked way from a mapping to a frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """A setting that a search may choose between two numbers; `log`: on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choices:
    """A setting that a search may choose among a few values."""

    values: tuple[Any, ...]


def tunable(
    default: T, low: float | None = None, high: float | None = None, *, log: bool = False, choices: Sequence[T] = ()
) -> T:
    """A dataclass field that `conceptx tune` may vary: between two numbers (whole ones where the default is whole), or
    among choices.

    Raises ValueError when neither is given, or both.
    """
    if (low is None or high is None) == (not choices):
        raise ValueError("A tunable field needs two limits, or choices.")
    space = Choices(tuple(choices)) if low is None or high is None else Range(low, high, log)
    return dataclasses.field(default=default, metadata={"tunable": space})


def tunable_fields(kind: type) -> dict[str, Range | Choices]:
    """What a search may vary of a dataclass, by the name of the field."""
    fields = dataclasses.fields(kind)
    return {field.name: field.metadata["tunable"] for field in fields if "tunable" in field.metadata}


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


# -- what settings must be -------------------------------------------------------------------------------------------


def require_choices(settings: Any) -> None:
    """Raises ValueError when a field that is a `Literal` has none of its values."""
    for name, hint in typing.get_type_hints(type(settings)).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
        if choices is not None and getattr(settings, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(settings, name)!r}.")


def require_positive(settings: object, *names: str) -> None:
    """Raises ValueError that names the settings that are not positive and finite; None passes."""
    values = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if wrong := [name for name, value in values.items() if not 0 < value < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be positive and finite.")


def require_not_negative(settings: object, *names: str) -> None:
    """Raises ValueError that names the settings that are negative or not finite."""
    if wrong := [name for name in names if not 0 <= getattr(settings, name) < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be finite and not negative.")


def require_templates(templates: Sequence[str]) -> None:
    """Raises ValueError unless there are prompt forms, each with {} once."""
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"Each of the templates must contain {{}} once for the name, got {templates}.")
