"""Progress of long work. The library reports; whoever wants to see it installs a listener (the command line does)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Listener = Callable[[str, int, int, str], None]  # what, done, total, note
T = TypeVar("T")

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(what: str, done: int, total: int, note: str = "") -> None:
    """Tell the listener, if there is one, that `done` of `total` units of `what` are complete."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total, note)


def track(items: Sequence[T] | Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a report after each."""
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    report(what, 0, count)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, count)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Reports inside the block go to the listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def shown() -> Iterator[None]:
    """Progress bars in the terminal, one for each kind of work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, transient=True) as bars:

        def show(what: str, done: int, total: int, note: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, note=note)
            bars.update(tasks[what], completed=done, total=total, note=note)
            if done >= total:
                bars.remove_task(tasks.pop(what))

        with heard_by(show):
            yield


def only_ours() -> None:
    """Silence the progress bars of transformers and datasets for the rest of the process."""
    from datasets.utils.logging import disable_progress_bar as no_dataset_bars
    from transformers.utils.logging import disable_progress_bar as no_model_bars

    no_model_bars()
    no_dataset_bars()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars of diffusers and transformers, and their notices on parts they do without, inside the block."""
    from diffusers.utils import logging as pipelines
    from transformers.utils import logging as models

    level, bars = models.get_verbosity(), (models.is_progress_bar_enabled(), pipelines.is_progress_bar_enabled())
    models.set_verbosity_error()
    models.disable_progress_bar()
    pipelines.disable_progress_bar()
    try:
        yield
    finally:
        models.set_verbosity(level)
        if bars[0]:
            models.enable_progress_bar()
        if bars[1]:
            pipelines.enable_progress_bar()
