"""Directions in which given rows have next to nothing, and those that a matrix hardly reads."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import gram
from conceptx.geometry.ridge import DenseMetric, eigenvalue_floor

BLOCK = 64  # columns that LAPACK works on at once


def outside(rows: Float[Tensor, "n d"], x: Float[Tensor, "m d"], threshold: float) -> Float[Tensor, "m d"]:
    """x without its part in the principal directions along which the rows' sum of squares is at least the threshold.

    It is x P, P the orthogonal projection onto the other directions. Float64 on the CPU. The eigenproblem has the
    smaller of n and d as its size; with fewer rows than dimensions x is first told apart from their span, so that what
    is orthogonal to all rows stays to full precision.
    """
    if len(rows) >= rows.shape[1]:
        return x - _loud_part(gram(rows), x, threshold)
    span, coordinates = torch.linalg.qr(rows.T)
    return x - _loud_part(gram(coordinates.T), x @ span, threshold) @ span.T


def _loud_part(moments: Float[Tensor, "d d"], x: Float[Tensor, "m d"], threshold: float) -> Float[Tensor, "m d"]:
    """The part of x in the eigenvectors whose eigenvalues are at least the threshold.

    moments = Q T Q' with T tridiagonal. x is turned by Q, projected on eigenvectors of T, and turned back: these need
    not be turned themselves, so that with few rows x it takes half as long as a whole decomposition.
    """
    from scipy.linalg import eigh_tridiagonal
    from scipy.linalg.lapack import dormqr, dsytrd

    if len(moments) == 1:
        return x * (moments[0] >= threshold)
    reflectors, diagonal, beside, scales, _ = dsytrd(moments.numpy().T, lower=1, lwork=BLOCK * len(moments))
    values, vectors = eigh_tridiagonal(diagonal, beside, lapack_driver="stevd")
    loud = vectors[:, np.searchsorted(values, threshold) :]
    q, work = np.asfortranarray(reflectors[1:, :-1]), BLOCK * len(x)
    columns = x.T.numpy()  # Q leaves the first coordinate as it is
    turned = np.concatenate([columns[:1], dormqr("L", "T", q, scales, columns[1:], lwork=work)[0]])
    part = loud @ (loud.T @ turned)
    return torch.from_numpy(np.concatenate([part[:1], dormqr("L", "N", q, scales, part[1:], lwork=work)[0]]).T)


def quiet_directions(weight: Float[Tensor, "out d"], preferred: Float[Tensor, "count d"]) -> Float[Tensor, "count d"]:
    """As many right-singular directions of a matrix, those with the smallest singular values, zeros included.

    Where more than so many are zero: the span of what the null space has of the preferred directions. Orthonormal, the
    largest entry of each positive. Float64 on the CPU.
    """
    count, width = preferred.shape
    if width - len(weight) > count:
        reader = DenseMetric(gram(weight.T))
        found = preferred.T
        for _ in range(2):  # the second time takes away what the first one's rounding left
            found = found - weight.T @ reader.solve(weight @ found)
    else:
        found = _smallest(gram(weight), count)
        found = found if found.shape[1] == count else found @ (found.T @ preferred.T)
    found = torch.linalg.qr(found).Q
    return (found * found.gather(0, found.abs().argmax(0, keepdim=True)).sign()).T


def principal_directions(rows: Float[Tensor, "n d"], count: int) -> Float[Tensor, "count d"]:
    """The directions along which the rows' sum of squares is largest."""
    return _eigh(gram(rows), rows.shape[1] - count, rows.shape[1] - 1)[1].T


def _smallest(square: Float[Tensor, "d d"], count: int) -> Float[Tensor, "d m"]:
    """Eigenvectors of the `count` smallest eigenvalues, or of all that are zero where these are more."""
    values, vectors = _eigh(square, 0, count)
    if values[count] > eigenvalue_floor(square.diagonal()):
        return vectors[:, :count]
    values, vectors = torch.linalg.eigh(square)
    return vectors[:, values <= eigenvalue_floor(values)]


def _eigh(square: Float[Tensor, "d d"], first: int, last: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues with these numbers, from the smallest on, and their eigenvectors as columns."""
    from scipy.linalg import eigh

    values, vectors = eigh(square.numpy(), subset_by_index=[first, last])
    return torch.from_numpy(values), torch.from_numpy(vectors)
