"""Files on disk: safetensors and JSON only, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from pydantic import BaseModel

Index = TypeVar("Index", bound="BaseModel")


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, so that a rename from it is atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then rename it over `path`: either the old file is there or the new one."""
    temporary = _beside(path)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of `folder` when the block ends without an error.

    Raises ValueError when `folder` holds anything that the new one does not: it would be lost.
    """
    temporary = _beside(folder)
    old = _beside(folder)
    temporary.mkdir()
    try:
        yield temporary
        require_replaceable(folder, _names(temporary))
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(folder: Path, names: Collection[str]) -> None:
    """Raises ValueError when `folder` is a file, or holds anything but these names: it would be lost."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a new or empty folder.")
    if lost := _names(folder) - set(names):
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(lost)[:3])}); give a new or empty folder.")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors as one safetensors file, atomically."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary, dict(metadata or {})))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from; its tensors are mapped, not read, until they are used.

    Raises FileNotFoundError when it is missing, ValueError when it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); it may have been cut off.") from None


def load_tensors(path: Path, expected: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises FileNotFoundError when it is missing, ValueError when it is damaged or has not the `expected` names.
    """
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    missing = sorted(set(expected or ()) - set(tensors))
    if missing:
        raise ValueError(f"{path} lacks the tensors {missing}; it holds {sorted(tensors)}.")
    return tensors


# -- a JSON file and the tensors that it names ---------------------------------------------------------------------


def save_indexed(folder: Path, stem: str, tensors: Mapping[str, Tensor], index: Callable[[str], BaseModel]) -> None:
    """Write `{stem}.json`, which is index(name of the tensor file), and that file.

    The tensor file's name carries a hash of its content, and the JSON is renamed into place last: an interrupted save
    leaves the old pair whole.
    """
    name = f"{stem}-{digest(tensors)}.safetensors"
    text = index(name).model_dump_json(indent=2)
    save_tensors(folder / name, tensors)
    write_atomically(folder / f"{stem}.json", lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
    for old in folder.glob(f"{stem}-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_index(path: Path, kind: type[Index], what: str) -> Index:
    """The JSON of `save_indexed`. what: what it is of, with its article.

    Raises FileNotFoundError when it is missing, ValueError when it is no JSON or not of this kind.
    """
    from pydantic import ValidationError

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {what.partition(' ')[2]} ({path.name} is missing).")
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{path} is not {what} of this version: {where}: {problem['msg']}.") from None


def load_beside(index: Path, name: str, what: str) -> dict[str, Tensor]:
    """The tensors that a JSON file names, which lie beside it. Raises ValueError when they lie elsewhere."""
    path = (index.parent / name).resolve()
    if path.parent != index.parent.resolve():
        raise ValueError(f"The {what}'s tensor file {name!r} lies outside its folder {index.parent}.")
    return load_tensors(path)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        # only a clone has plain strides: a "contiguous" transposed row may not have them
        row = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
        found.update(row.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
