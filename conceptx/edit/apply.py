"""Putting an edit into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conceptx.edit.deltas import Delta
from conceptx.edit.host import Host

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit


class Applied:
    """An edit in force. `undo()` restores what was replaced (it never subtracts: w + d - d is not always w)."""

    def __init__(self, edit: Edit, model: Host) -> None:
        self.edit = edit
        self._model = model
        self._restore: list[Callable[[], Any]] = []

    @property
    def in_force(self) -> bool:
        return self in self._model.applied

    def undo(self) -> None:
        """Restore the model. A second call does nothing. Raises ValueError while a later edit is in force."""
        if not self.in_force:
            return
        if self._model.applied[-1] is not self:
            raise ValueError("A later edit is in force on this model; undo that one first.")
        self._model.applied.pop()
        self._take_back()

    def _take_back(self) -> None:
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def apply(edit: Edit, model: Host) -> Applied:
    """Check everything, then change the model; on an error half-way put back what was changed."""
    check(edit, model)
    handle = Applied(edit, model)
    try:
        for restore in _changes(edit, model):
            handle._restore.append(restore)
    except BaseException:
        handle._take_back()
        raise
    model.applied.append(handle)
    return handle


def check(edit: Edit, model: Host) -> None:
    """Raises ValueError or KeyError, in one sentence, unless the edit fits the model in every place."""
    if reason := edit.host.mismatch(model.fingerprint):
        raise ValueError(f"The edit was made for another model: {reason}.")
    for name, delta in edit.deltas.items():
        shape = model.parameter_shape(name)
        if not delta.fits(shape):
            raise ValueError(f"The change of {name} does not fit its shape {shape}.")
    for site, maps in edit.maps.items():
        width = model.width(site)
        if wrong := [m.dim for m in maps if m.dim != width]:
            raise ValueError(f"The map at {site} acts on dimension {wrong[0]}, the site has {width}.")


def _changes(edit: Edit, model: Host) -> Iterator[Callable[[], Any]]:
    for name, delta in edit.deltas.items():
        yield _change_parameter(model, name, delta)
    for site, maps in edit.maps.items():
        for concept_map in maps:
            yield model.install(site, concept_map).remove


@torch.no_grad()
def _change_parameter(model: Host, name: str, delta: Delta) -> Callable[[], Any]:
    live = model.parameter(name)
    if live is None:
        model.add_bias(name, delta.added_to(torch.zeros(model.parameter_shape(name), dtype=torch.float64)))
        return lambda: model.drop_bias(name)
    before = live.clone()
    live.copy_(delta.added_to(live))
    return lambda: _put_back(model, name, before)


@torch.no_grad()
def _put_back(model: Host, name: str, before: Tensor) -> None:
    """Into the parameter as it is now: the model may have moved to another device since."""
    live = model.parameter(name)
    assert live is not None  # only biases come and go, and those are dropped
    live.copy_(before)
