"""An edit on disk: `edit.json` (names, provenance) and one safetensors file (tensors, fingerprint).

See `conceptx.store.save_indexed` for how an interrupted save leaves the old pair whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from conceptx.edit.deltas import DELTAS, Delta
from conceptx.edit.host import Fingerprint, Part
from conceptx.geometry import ActivationMap, ConceptMap, FeatureMap
from conceptx.store import load_beside, load_index, save_indexed

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit

INDEX = "edit.json"


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["conceptx-edit"]
    version: Literal[2]
    tensors: str
    host: dict[str, str]  # component -> structure
    maps: dict[str, list[str | dict[str, Any]]]  # site -> of each map its gate, or the settings of a FeatureMap
    deltas: dict[str, str]  # parameter -> kind
    generation: dict[str, Any]
    provenance: list[dict[str, Any]]


def save(edit: Edit, folder: Path) -> None:
    """See `Edit.save`."""
    save_indexed(
        folder,
        "edit",
        _tensors(edit),
        lambda tensors: _Index(
            format="conceptx-edit",
            version=2,
            tensors=tensors,
            host={part: found.structure for part, found in edit.host.parts.items()},
            maps={site: [_described(m) for m in maps] for site, maps in edit.maps.items()},
            deltas={parameter: delta.kind for parameter, delta in edit.deltas.items()},
            generation=dict(edit.generation),
            provenance=[dict(p) for p in edit.provenance],
        ),
    )


def load(folder: Path) -> Edit:
    """See `Edit.load`."""
    from conceptx.edit.edit import Edit

    index = load_index(folder / INDEX, _Index, "an edit")
    tensors = load_beside(folder / INDEX, index.tensors, "edit")
    try:
        maps = {site: _load_maps(tensors, site, described) for site, described in index.maps.items()}
        deltas = {name: _load_delta(tensors, name, kind) for name, kind in index.deltas.items()}
        parts = {part: Part(structure, tensors[f"fingerprint:{part}"]) for part, structure in index.host.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / index.tensors} does not hold what {INDEX} says: {error}.") from None
    return Edit(Fingerprint(parts), maps, deltas, index.generation, tuple(index.provenance))


def _tensors(edit: Edit) -> dict[str, Tensor]:
    tensors = {f"fingerprint:{name}": part.samples for name, part in edit.host.parts.items()}
    for site, maps in edit.maps.items():
        for number, m in enumerate(maps):
            tensors |= {f"map:{site}:{number}:{part}": tensor for part, tensor in m.tensors().items()}
    for name, delta in edit.deltas.items():
        tensors |= {f"delta:{name}:{part}": tensor for part, tensor in delta.tensors().items()}
    return tensors


def _described(concept_map: ActivationMap) -> str | dict[str, Any]:
    return concept_map.gate if isinstance(concept_map, ConceptMap) else concept_map.settings()


def _load_maps(
    tensors: dict[str, Tensor], site: str, described: list[str | dict[str, Any]]
) -> tuple[ActivationMap, ...]:
    parts = [_with_prefix(tensors, f"map:{site}:{number}:") for number in range(len(described))]
    return tuple(
        ConceptMap(**mine, gate=how) if isinstance(how, str) else FeatureMap.of(how, mine)
        for how, mine in zip(described, parts, strict=True)
    )


def _load_delta(tensors: dict[str, Tensor], name: str, kind: str) -> Delta:
    return DELTAS[kind](**_with_prefix(tensors, f"delta:{name}:"))


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
