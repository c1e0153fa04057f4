"""The border of the geometry: numpy arrays and torch tensors come in, the same type, dtype and device goes out."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)


def working_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it (Apple's MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_working(x: Array | list) -> Tensor:
    """`x` as a tensor in the working dtype, on its own device."""
    tensor = x if isinstance(x, Tensor) else torch.as_tensor(np.require(x, requirements="W"))  # no read-only views
    return tensor.detach().to(working_dtype(tensor.device))


def like(result: Tensor, template: ArrayT) -> ArrayT:
    """`result` as the type, dtype and device of `template` (an integer template gives its default float)."""
    if isinstance(template, Tensor):
        dtype = template.dtype if template.is_floating_point() else torch.get_default_dtype()
        return result.to(device=template.device, dtype=dtype)
    dtype = template.dtype if np.issubdtype(template.dtype, np.floating) else np.dtype(np.float64)
    return result.cpu().numpy().astype(dtype, copy=False)


def finite(x: Tensor, name: str) -> Tensor:
    """`x` unchanged, or a ValueError that says how many entries are NaN or infinite."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite entries of {x.numel()}; clean them first.")
    return x


def matrix(x: Array | list, name: str, *, width: int | None = None) -> Tensor:
    """`x` as a finite (rows, columns) tensor in the working dtype.

    Raises ValueError when `x` is not two-dimensional, is empty, is not finite, or has not `width` columns.
    """
    tensor = to_working(x)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must be a non-empty matrix (rows, columns), got shape {tuple(tensor.shape)}.")
    if width is not None and tensor.shape[1] != width:
        raise ValueError(f"{name} has {tensor.shape[1]} columns where {width} are expected.")
    return finite(tensor, name)


def gram(rows: Tensor) -> Tensor:
    """rows' rows (d, d) for rows (n, d). On the CPU by numpy, which computes one half and mirrors it."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    plain = rows.numpy()
    return torch.from_numpy(plain.T @ plain)
