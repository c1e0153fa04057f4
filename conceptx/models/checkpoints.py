"""Folding an edit into a model folder on the disk, a tensor at a time: the model is never loaded.

The model is known without its weights, from its configuration, so names, shapes, sites and readers are those of the
model in memory, and the arithmetic is that of `Edit.fold` and `Edit.apply`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from conceptx.edit import Delta, Edit
from conceptx.edit.apply import check
from conceptx.edit.fold import absorbed, layer_changes, layer_of, left_over, require_none
from conceptx.geometry import ConceptMap
from conceptx.models import parameters
from conceptx.models.on_disk import (
    CONFIG,
    ModelOnDisk,
    PipelineOnDisk,
    Place,
    index_of,
    mapped,
    on_disk,
    read_json,
)
from conceptx.progress import track
from conceptx.store import replaced_folder, require_replaceable

# files of weights that are not safetensors; copied as they are they would hold the concept, and most are pickles
FOREIGN = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pb", ".pt", ".pth")
COPIED_AT_ONCE = 1 << 20  # bytes
NO_WEIGHTS = "training_args.bin"  # what a Trainer leaves behind


@dataclass(frozen=True)
class Folding:
    """What was done.

    weights: how many tensors were changed or added.
    tensors: how many the edited components have.
    size:    bytes of the new folder.
    """

    weights: int
    tensors: int
    size: int


Plan = Mapping[str, tuple[ConceptMap, ...]]  # layer that changes -> the maps that it takes in


def fold_checkpoint(checkpoint: str | Path, edit: Edit, out: str | Path) -> Folding:
    """Write a copy of a model folder with the edit folded into its weights; the folder itself stays as it is.

    checkpoint: a folder of `transformers` (a causal language model or a Janus) or `diffusers` (with a
                `model_index.json`), its weights in safetensors, one file or many.
    out:        appears when it is complete, or not at all. May be there if it holds only files of the same names.

    Every tensor is bit for bit what folding in memory gives, in the precision in which it is stored. Memory holds the
    edit and what changing one tensor needs. Hidden folders are left out.

    Raises FileNotFoundError when there is no such model; ValueError or KeyError, before anything is written, when the
    edit was made for another model, when a part of it is no change of weights or needs a bias for which there is no
    place, when the folder holds weights that would stay unedited or links that lead out of it, when `out` holds other
    files, or when the disk is too full.
    """
    source, target = Path(checkpoint).expanduser(), Path(out).expanduser()
    files = _files(source)
    _check_target(source, target, files)
    host = on_disk(source)
    _check_all_edited(source, files, host)
    plan = _plan(edit, host)
    switches, biases = _new_biases(edit, host, plan)
    with replaced_folder(target) as temporary:
        _copy(source, temporary, files, host.beside_weights(biases))
        if switches:
            _rewrite(temporary / CONFIG, lambda config: {**config, **switches})
        changed = _write_changes(temporary, edit, host, plan)
        size = sum((temporary / file).stat().st_size for file in files)
    return Folding(changed + len(biases), len(host.stored) + len(biases), size)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """All files of a folder that are not in hidden ones (.git, .cache), relative to it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    root, found = folder.resolve(), []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(name.startswith(".") for name in relative.parent.parts):
            continue
        if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
            raise ValueError(
                f"{path} is a link out of the folder or to a folder; copy what it leads to (cp -rL) first."
            )
        if path.suffix in FOREIGN and path.name != NO_WEIGHTS:
            raise ValueError(f"{path} is not safetensors and would stay unedited; take it out of the folder.")
        if path.is_file():
            found.append(relative)
    return found


def _check_target(source: Path, target: Path, files: Iterable[Path]) -> None:
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} is the checkpoint itself or lies in it; give another folder for the new one.")
    require_replaceable(target, {file.parts[0] for file in files})
    needed = sum((source / file).stat().st_size for file in files)
    free = shutil.disk_usage(next(path for path in target.resolve().parents if path.is_dir())).free
    if needed > free:
        raise ValueError(f"The new folder needs {needed:,} bytes beside {target}, {free:,} are free.")


def _check_all_edited(source: Path, files: Iterable[Path], host: ModelOnDisk) -> None:
    """Raises ValueError when there are weights that would be copied unedited."""
    edited = {place.file for place in host.stored}
    others = set(host.pipeline.components) - set(host.components) if isinstance(host, PipelineOnDisk) else set()
    for file in files:
        if file.suffix == ".safetensors" and file not in edited and file.parts[0] not in others:
            raise ValueError(f"{source / file} belongs to no component and would stay unedited; take it out.")


def _plan(edit: Edit, host: ModelOnDisk) -> Plan:
    """What changes where. Raises ValueError or KeyError unless the edit fits and is weights alone."""
    if edit.generation:
        raise ValueError(f"The generation arguments {sorted(edit.generation)} cannot be folded into weights.")
    check(edit, host)
    require_none(left_over(edit, host))
    return {layer_of(name): () for name in edit.deltas} | absorbed(edit, host)


def _new_biases(edit: Edit, host: ModelOnDisk, plan: Plan) -> tuple[dict[str, bool], dict[str, Delta]]:
    """Switches of the configuration, and the biases that the checkpoint has not. Raises ValueError without a place."""
    needed: dict[str, Delta] = {}
    for layer, maps in plan.items():
        name = f"{layer}.bias"
        if name not in host.places and (name in edit.deltas or any(bool(m.mean.any()) for m in maps)):
            changes = layer_changes(edit, host, layer, maps)
            needed |= {name: changes[name]} if name in changes else {}
    switches, zeros = host.bias_room(needed)
    return switches, {**needed, **zeros}


# -- writing -----------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path, files: Iterable[Path], added: Mapping[Path, Mapping[str, Tensor]]) -> None:
    """Copy the files, with new tensors in some of them."""
    for file in track(list(files), "files"):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file in added:
            _extend(source / file, target / file, added[file])
        else:
            shutil.copyfile(source / file, target / file)
    for file, tensors in added.items():
        if index := index_of((target / file).parent):
            _rewrite(index, partial(_indexed, file.name, tensors))


def _extend(source: Path, target: Path, biases: Mapping[str, Tensor]) -> None:
    """A copy of a safetensors file with biases behind what it holds, without holding it."""
    with source.open("rb") as old, target.open("wb") as new:
        header, start = _header(old)
        end = source.stat().st_size - start
        for key, bias in biases.items():
            kind = header[f"{layer_of(key)}.weight"]["dtype"]
            header[key] = {"dtype": kind, "shape": list(bias.shape), "data_offsets": [end, end + bias.nbytes]}
            end += bias.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, COPIED_AT_ONCE)
        for bias in biases.values():
            new.write(_bytes(bias))


def _indexed(file: str, added: Mapping[str, Tensor], index: dict[str, Any]) -> dict[str, Any]:
    """An index that knows of new tensors."""
    totals = {
        "total_size": sum(t.nbytes for t in added.values()),
        "total_parameters": sum(map(torch.numel, added.values())),
    }
    before = index.get("metadata") or {}
    metadata = {key: value + totals.get(key, 0) for key, value in before.items()}
    return {**index, "metadata": metadata, "weight_map": {**index["weight_map"], **dict.fromkeys(added, file)}}


def _write_changes(folder: Path, edit: Edit, host: ModelOnDisk, plan: Plan) -> int:
    """Change the copied weights where they are, a layer at a time. Returns how many."""
    changed: set[Place] = set()
    for layer, maps in track(plan.items(), "layers", len(plan)):
        for name, delta in layer_changes(edit, host, layer, maps).items():
            for place in host.places.get(name, ()):  # a new bias is there already
                _change(folder, place, partial(parameters.oriented, host.module, name), delta)
                changed.add(place)
    return len(changed)


def _change(folder: Path, place: Place, orient: Callable[[Tensor], Tensor], delta: Delta) -> None:
    changed = orient(delta.added_to(orient(mapped(folder, place))))
    with (folder / place.file).open("r+b") as file:
        header, start = _header(file)
        file.seek(start + header[place.key]["data_offsets"][0])
        file.write(_bytes(changed))


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """(what a safetensors file says of its tensors, where their data begins); the file is then at that place."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(read_json(path)), indent=2) + "\n", encoding="utf-8")
