"""Which method works on what, read from the annotations of `erase` and `fit`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conceptx import methods


@dataclass(frozen=True)
class Capability:
    """One row of the table: class and file of a method, its hosts, its settings, its source."""

    name: str
    module: str
    hosts: tuple[str, ...]
    settings: tuple[str, ...]
    source: str


def capabilities() -> list[Capability]:
    """All methods, in the order of their names."""
    return [_capability(name) for name in methods.__all__]


def _capability(name: str) -> Capability:
    eraser = getattr(methods, name)
    source = (inspect.getmodule(eraser).__doc__ or "").strip().splitlines()[0]
    settings = tuple(f"{f.name}={f.default}" for f in dataclasses.fields(eraser))
    return Capability(name, methods.MODULES[name], tuple(_hosts(eraser)), settings, source)


def _hosts(eraser: Any) -> Iterator[str]:
    from conceptx.eraser import hosts

    if hasattr(eraser, "fit"):
        yield "vectors"
    yield from hosts(eraser)
