"""PCA directions: the principal components of the differences between rows that differ in the concept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conceptx.eraser import VectorEraser
from conceptx.geometry import Array, Subspace
from conceptx.geometry.arrays import matrix
from conceptx.geometry.labels import class_indices


@dataclass(frozen=True)
class PCADirections(VectorEraser):
    """Bolukbasi et al. 2016, "Man is to computer programmer as woman is to homemaker?", arXiv 1607.06520, §6.

    The subspace of the top principal components of pair differences (she - he, woman - man, ...). `fit_pairs`
    takes given pairs, as published. `fit` takes labels instead, and every two rows of different classes are a
    pair. The components are those of the raw second moment, so the mean difference counts. No guarantee: a
    linear classifier usually still finds the concept.

    rank: how many components.
    """

    rank: int = 1

    def fit(self, X: Array, z: Array) -> Subspace:
        """The subspace from all pairs of rows of X (n, d) whose classes z (n,) differ.

        Their second moment is n S - sum_c n_c S_c with the scatter S of all rows and S_c of each class.
        Raises ValueError for continuous labels, one class only, or a rank above d.
        """
        x = matrix(X, "X")
        indices, classes = class_indices(z, len(x))
        indices = indices.to(x.device)
        within = torch.stack([_pair_scatter(x[indices == c]) for c in range(classes)])
        return self._top(_pair_scatter(x) - within.sum(0), x.mean(0))

    def fit_pairs(self, A: Array, B: Array) -> Subspace:
        """The subspace from the differences of the rows of A (n, d) and B (n, d).

        Raises ValueError when the shapes differ or the rank is above d.
        """
        a = matrix(A, "A")
        b = matrix(B, "B", width=a.shape[1])
        if len(a) != len(b):
            raise ValueError(f"Pairs need as many rows in A as in B, got {len(a)} and {len(b)}.")
        difference = a - b
        return self._top(difference.T @ difference, torch.cat([a, b]).mean(0))

    def _top(self, second_moment: Tensor, mean: Tensor) -> Subspace:
        d = len(mean)
        if not 1 <= self.rank <= d:
            raise ValueError(f"The rank must lie between 1 and the dimension {d}, got {self.rank}.")
        return Subspace.orthogonal(torch.linalg.eigh(second_moment).eigenvectors.flip(1)[:, : self.rank], mean)


def _pair_scatter(x: Tensor) -> Tensor:
    """The sum over all pairs of rows of (x_i - x_j)(x_i - x_j)', that is n times the scatter about the mean."""
    centred = x - x.mean(0)
    return len(x) * (centred.T @ centred)
