"""Turning activation maps into weight changes of the linear layers that read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from conceptx.edit.apply import check
from conceptx.edit.deltas import Delta, Dense, LowRank, combine
from conceptx.edit.host import Host
from conceptx.geometry import ActivationMap, ConceptMap

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit

ALIGNMENT = 64  # bytes, of what torch allocates


def fold(edit: Edit, model: Host) -> Edit:
    """See `Edit.fold`."""
    check(edit, model)
    maps, deltas = left_over(edit, model), dict(edit.deltas)
    for layer, taken_in in absorbed(edit, model).items():
        deltas |= layer_changes(edit, model, layer, taken_in)
    # a map of the text fits every denoiser that reads it, the folded weights this one alone
    return replace(edit, host=edit.host if maps == edit.maps else model.fingerprint, maps=maps, deltas=deltas)


def left_over(edit: Edit, model: Host) -> dict[str, tuple[ActivationMap, ...]]:
    """The maps that stay maps, by site: one there is not affine, or no linear layer reads the site directly."""
    return {site: maps for site, maps in edit.maps.items() if not model.readers(site) or len(_affine(maps)) < len(maps)}


def absorbed(edit: Edit, model: Host) -> dict[str, tuple[ConceptMap, ...]]:
    """The maps that each linear layer takes in, in this order: W T_n(...T_1(x)) + b takes in the last one first."""
    left = left_over(edit, model)
    found: dict[str, tuple[ConceptMap, ...]] = {}
    for site, maps in edit.maps.items():
        for reader in () if site in left else model.readers(site):
            found[reader] = found.get(reader, ()) + _affine(maps)[::-1]
    return found


def layer_changes(edit: Edit, model: Host, layer: str, maps: Iterable[ConceptMap]) -> dict[str, Delta]:
    """What the folded edit changes in one layer: the edit's own changes of its parameters, then what the maps add."""
    changes = {name: delta for name, delta in edit.deltas.items() if layer_of(name) == layer}
    name, bias = f"{layer}.weight", f"{layer}.bias"
    for concept_map in maps:
        up, down, shift = concept_map.factors(_current(model, changes, name))
        _accumulate(changes, name, LowRank(up, down))
        if bool((shift != 0).any()):
            _accumulate(changes, bias, Dense(shift))
    return changes


def layer_of(parameter: str) -> str:
    """The path of the module that has the parameter."""
    return parameter.rpartition(".")[0]


def require_none(maps: Collection[str]) -> None:
    """Raises ValueError that names the sites, when maps are left over where only weights can be kept."""
    if maps:
        raise ValueError(f"The maps at {sorted(maps)[:3]} cannot be folded into weights.")


def _affine(maps: tuple[ActivationMap, ...]) -> tuple[ConceptMap, ...]:
    return tuple(m for m in maps if isinstance(m, ConceptMap) and m.affine)


def _current(model: Host, deltas: Mapping[str, Delta], name: str) -> torch.Tensor:
    weight = model.parameter(name)
    assert weight is not None  # only biases may be absent
    return deltas[name].added_to(weight.detach().double()) if name in deltas else _aligned(weight.detach())


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """At an address where tensors usually lie: the last bit of a product depends on it, and a checkpoint that is mapped
    into memory may lie anywhere."""
    return weight.clone() if weight.data_ptr() % ALIGNMENT else weight


def _accumulate(deltas: dict[str, Delta], name: str, delta: Delta) -> None:
    deltas[name] = combine(deltas[name], delta) if name in deltas else delta
