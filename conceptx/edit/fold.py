"""Turning activation maps into weight changes of the linear layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from conceptx.edit.apply import check
from conceptx.edit.deltas import Delta, Dense, LowRank, combine
from conceptx.edit.host import Host
from conceptx.geometry import ConceptMap

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit


def fold(edit: Edit, model: Host) -> Edit:
    """See `Edit.fold`."""
    check(edit, model)
    deltas, maps = dict(edit.deltas), {}
    for site, site_maps in edit.maps.items():
        readers = model.readers(site)
        affine = tuple(m for m in site_maps if isinstance(m, ConceptMap) and m.affine)
        if not readers or len(affine) < len(site_maps):
            maps[site] = site_maps
            continue
        for reader in readers:
            _fold_into(deltas, model, reader, affine)
    # a map of the text fits every denoiser that reads it, the folded weights this one alone
    return replace(edit, host=edit.host if maps == edit.maps else model.fingerprint, maps=maps, deltas=deltas)


def _fold_into(deltas: dict[str, Delta], model: Host, reader: str, maps: tuple[ConceptMap, ...]) -> None:
    """W T_n(...T_1(x)) + b: the last map is absorbed first."""
    name, bias = f"{reader}.weight", f"{reader}.bias"
    for concept_map in reversed(maps):
        weight = _current(model, deltas, name)
        up, down, shift = concept_map.factors(weight)
        _accumulate(deltas, name, LowRank(up, down))
        if bool((shift != 0).any()):
            _accumulate(deltas, bias, Dense(shift))


def _current(model: Host, deltas: Mapping[str, Delta], name: str) -> torch.Tensor:
    weight = model.parameter(name)
    assert weight is not None  # only biases may be absent
    return deltas[name].added_to(weight.detach().double()) if name in deltas else weight.detach()


def _accumulate(deltas: dict[str, Delta], name: str, delta: Delta) -> None:
    deltas[name] = combine(deltas[name], delta) if name in deltas else delta
