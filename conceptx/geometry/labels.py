"""Concept labels of any kind as columns of numbers, or as class indices."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.geometry.arrays import Array, matrix


def encode_labels(labels: Array | list, count: int) -> Float[Tensor, "n k"]:
    """The labels of `count` rows as float64 columns.

    Two classes (texts, booleans, whole numbers) become one 0/1 column, k > 2 classes become k one-hot columns.
    A vector of numbers that are not all whole is one continuous column; a matrix (n, k) is taken as it is, so
    whole numbers that are meant as a quantity are given as a matrix (n, 1).

    Raises ValueError for a wrong length, NaN or missing labels, or labels that are all the same.
    """
    values = _values(labels, count)
    if values.ndim == 2:
        return _varying(matrix(values.astype(np.float64), "The labels"))
    if _is_continuous(values):
        return torch.as_tensor(values.astype(np.float64))[:, None]
    indices, classes = _classes(values)
    return one_hot(indices, len(classes)) if len(classes) > 2 else indices[:, None].double()


def class_indices(labels: Array | list, count: int) -> tuple[Int[Tensor, " n"], int]:
    """(index of each row's class, number of classes), for methods that train a classifier.

    Accepts what `encode_labels` takes as classes, and a 0/1 or one-hot matrix. Raises ValueError otherwise.
    """
    values = _values(labels, count)
    if values.ndim == 2:
        values = _undo_one_hot(matrix(values.astype(np.float64), "The labels")).numpy()
    if _is_continuous(values):
        raise ValueError("This method needs classes, but the labels are continuous numbers.")
    indices, classes = _classes(values)
    return indices, len(classes)


def one_hot(indices: Int[Tensor, " n"], classes: int) -> Float[Tensor, "n k"]:
    """One column a class, 1 where the row belongs to it (float64)."""
    return torch.nn.functional.one_hot(indices, classes).double()


def _values(labels: Array | list, count: int) -> np.ndarray:
    values = labels.detach().cpu() if isinstance(labels, Tensor) else labels
    if isinstance(values, Tensor) and values.dtype == torch.bfloat16:  # numpy has no bfloat16
        values = values.float()
    array = np.asarray(values)
    if array.ndim not in (1, 2) or len(array) != count:
        raise ValueError(f"The labels must be (n,) or (n, k) with n = {count} rows, got shape {array.shape}.")
    if array.dtype.kind not in "buifUSO":
        raise ValueError(f"Labels of type {array.dtype} are neither classes nor numbers.")
    if missing := sum(value is None or value != value for value in array.ravel().tolist()):
        raise ValueError(f"The labels hold {missing} NaN or missing entries of {array.size}; remove those rows.")
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise ValueError(
            f"The labels hold {np.isinf(array).sum()} NaN or infinite entries of {array.size}; remove those rows."
        )
    return array


def _is_continuous(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool((values != np.round(values)).any())


def _classes(values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    try:
        classes, indices = np.unique(values, return_inverse=True)
    except TypeError:
        raise ValueError("The labels mix kinds that cannot be sorted (for example text and numbers).") from None
    if len(classes) < 2:
        raise ValueError(f"The labels have one class only, {classes[0].item()!r}; a concept needs at least two.")
    return torch.as_tensor(indices, dtype=torch.int64), classes


def _varying(columns: Tensor) -> Tensor:
    if bool((columns == columns[0]).all()):
        raise ValueError("The labels are the same in every row; a concept needs rows that differ.")
    return columns


def _undo_one_hot(columns: Tensor) -> Tensor:
    binary = bool(((columns == 0) | (columns == 1)).all())
    if columns.shape[1] == 1 and binary:
        return columns[:, 0]
    if not binary or not bool((columns.sum(1) == 1).all()):
        raise ValueError("This method needs classes: a vector of labels or a one-hot matrix.")
    return columns.argmax(1)
