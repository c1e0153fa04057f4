"""INLP: remove what a linear classifier reads, train another one on what is left, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import LinearSVC
from torch import Tensor

from conceptx.eraser import VectorEraser
from conceptx.geometry import Array, Subspace
from conceptx.geometry.arrays import matrix
from conceptx.geometry.labels import class_indices


@dataclass(frozen=True)
class INLP(VectorEraser):
    """Ravfogel et al. 2020, "Null It Out", ACL 2020, arXiv 2004.07667, Algorithm 1 (read from the authors' code).

    Each round fits a linear support vector machine to the rows without the subspace found so far. The subspace
    after a round is the span of all classifiers' weights up to it, computed anew and taken out of the original
    rows (the intersection of their null spaces), so rounding does not add up.

    It stops after `rounds` rounds, as published, or earlier when a classifier finds no direction that is new (at
    the latest when the subspace fills the space). There is no test of the accuracy: a chosen number of rounds
    gives no guarantee, and hundreds of directions may go. Differs from the authors' code: X is centred first (the
    result is an affine map that keeps the mean), and the dev-set threshold is left out since `fit` has one set.

    rounds:    classifiers one after the other (the authors': 35 for word vectors, 300 for sentences). Each takes
               one direction for two classes and up to k for k > 2.
    strength:  C of the support vector machine; more means less regularisation.
    intercept: whether the classifiers have one.
    balanced:  weigh rows by the inverse frequency of their class.
    seed:      of the classifiers.
    """

    rounds: int = 35  # N
    strength: float = 1.0  # C
    intercept: bool = False
    balanced: bool = False
    seed: int = 0

    def fit(self, X: Array, z: Array) -> Subspace:
        """The orthogonal subspace of the classes z (n,) in X (n, d), of rank up to rounds (two classes).

        Raises ValueError for continuous labels, one class only, rounds < 1, or a first classifier of zeros.
        """
        if self.rounds < 1:
            raise ValueError(f"INLP needs at least one round, got {self.rounds}.")
        x = matrix(X, "X")
        indices, _ = class_indices(z, len(x))
        mean = x.mean(0)
        basis = self._collect(x - mean, indices.numpy())
        if basis.shape[1] == 0:
            raise ValueError("The first classifier found no direction; X does not tell the classes apart.")
        return Subspace.orthogonal(basis, mean)

    def _collect(self, centred: Tensor, indices: np.ndarray) -> Tensor:
        found: list[Tensor] = []
        basis = centred.new_zeros(centred.shape[1], 0)
        for _ in range(self.rounds):
            found.append(_span(self._weights(centred - centred @ basis @ basis.T, indices).T))
            wider = _span(torch.cat(found, 1))
            if wider.shape[1] == basis.shape[1]:
                break
            basis = wider
        return basis

    def _weights(self, x: Tensor, indices: np.ndarray) -> Tensor:
        classifier = LinearSVC(
            C=self.strength,
            fit_intercept=self.intercept,
            class_weight="balanced" if self.balanced else None,
            dual=False,
            max_iter=10_000,
            random_state=self.seed,
        )
        return torch.as_tensor(classifier.fit(x.cpu().numpy(), indices).coef_).to(x)


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span; singular values below 1e-6 of the largest are not directions."""
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-6 * singular[:1]]
