"""An edit on disk: `edit.json` (names, provenance) and one safetensors file (tensors, fingerprint).

`edit.json` names the tensor file it belongs to, and that file's name carries a hash of its content. The JSON is
renamed into place last, so an interrupted save leaves the old pair whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from conceptx.edit.deltas import DELTAS, Delta
from conceptx.edit.host import Fingerprint, Part
from conceptx.geometry import ConceptMap
from conceptx.store import load_tensors, save_tensors, write_atomically

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit

INDEX = "edit.json"


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["conceptx-edit"]
    version: Literal[2]
    tensors: str
    host: dict[str, str]  # component -> structure
    maps: dict[str, list[str]]  # site -> gate of each map
    deltas: dict[str, str]  # parameter -> kind
    generation: dict[str, Any]
    provenance: list[dict[str, Any]]


def save(edit: Edit, folder: Path) -> None:
    """See `Edit.save`."""
    tensors = _tensors(edit)
    name = f"edit-{_digest(tensors)}.safetensors"
    index = _Index(
        format="conceptx-edit",
        version=2,
        tensors=name,
        host={part: found.structure for part, found in edit.host.parts.items()},
        maps={site: [m.gate for m in maps] for site, maps in edit.maps.items()},
        deltas={parameter: delta.kind for parameter, delta in edit.deltas.items()},
        generation=dict(edit.generation),
        provenance=[dict(p) for p in edit.provenance],
    )
    text = index.model_dump_json(indent=2)
    save_tensors(folder / name, tensors)
    write_atomically(folder / INDEX, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    for old in folder.glob("edit-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(folder: Path) -> Edit:
    """See `Edit.load`."""
    from conceptx.edit.edit import Edit

    index = _read_index(folder / INDEX)
    path = (folder / index.tensors).resolve()
    if path.parent != folder.resolve():
        raise ValueError(f"The edit's tensor file {index.tensors!r} lies outside its folder {folder}.")
    tensors = load_tensors(path)
    try:
        maps = {site: _load_maps(tensors, site, gates) for site, gates in index.maps.items()}
        deltas = {name: _load_delta(tensors, name, kind) for name, kind in index.deltas.items()}
        parts = {part: Part(structure, tensors[f"fingerprint:{part}"]) for part, structure in index.host.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold what {INDEX} says: {error}.") from None
    return Edit(Fingerprint(parts), maps, deltas, index.generation, tuple(index.provenance))


def _read_index(path: Path) -> _Index:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no edit ({INDEX} is missing).")
    try:
        return _Index.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path} is not an edit of this version: {where}: {problem['msg']}.") from None


def _tensors(edit: Edit) -> dict[str, Tensor]:
    tensors = {f"fingerprint:{name}": part.samples for name, part in edit.host.parts.items()}
    for site, maps in edit.maps.items():
        for number, m in enumerate(maps):
            parts = {"write": m.write, "read": m.read, "mean": m.mean}
            tensors |= {f"map:{site}:{number}:{part}": tensor for part, tensor in parts.items()}
    for name, delta in edit.deltas.items():
        tensors |= {f"delta:{name}:{part}": tensor for part, tensor in delta.tensors().items()}
    return tensors


def _load_maps(tensors: dict[str, Tensor], site: str, gates: list[str]) -> tuple[ConceptMap, ...]:
    prefixes = [f"map:{site}:{number}:" for number in range(len(gates))]
    return tuple(
        ConceptMap(tensors[p + "write"], tensors[p + "read"], tensors[p + "mean"], gate)
        for p, gate in zip(prefixes, gates, strict=True)
    )


def _load_delta(tensors: dict[str, Tensor], name: str, kind: str) -> Delta:
    prefix = f"delta:{name}:"
    return DELTAS[kind](**{key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        # only a clone has plain strides: a "contiguous" transposed row may not have them
        row = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
