"""Files on disk: safetensors and JSON only, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
        if lost := _names(folder) - _names(temporary):
            raise ValueError(f"{folder} holds other files ({', '.join(sorted(lost)[:3])}); give a new or empty folder.")
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


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors as one safetensors file, atomically."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary, dict(metadata or {})))


def load_tensors(path: Path, expected: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises FileNotFoundError when it is missing, ValueError when it is damaged or has not the `expected` names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); it may have been cut off.") from None
    missing = sorted(set(expected or ()) - set(tensors))
    if missing:
        raise ValueError(f"{path} lacks the tensors {missing}; it holds {sorted(tensors)}.")
    return tensors
