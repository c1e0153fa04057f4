"""Dictionaries that are computed, not trained: independent components, principal components, a contrast."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor

from conceptx.geometry import AffineDictionary, Array
from conceptx.geometry.arrays import matrix

logger = logging.getLogger("conceptx")
ITERATIONS = 40  # the search gains little beyond (docs/dictionaries.md)
TOLERANCE = 1e-3  # of the cosine between a direction and itself one iteration earlier
RANK = 1e-12  # variances below this share of the largest are rounding


def ica(states: Array, components: int = 256, *, seed: int = 0) -> AffineDictionary:
    """Independent components of states (n, d): features of variance 1, as far from Gaussian as they can be.

    FastICA with log cosh (Hyvarinen 1999) inside the span of the first principal components. The long tail of every
    feature is its positive side. The search runs in float32 and may stop before it has converged.
    Raises ValueError when the states do not vary in so many dimensions.
    """
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    x = matrix(states, "states")
    mean, axes, deviations = _principal(x, components)
    white = ((x - mean) @ (axes / deviations)).float()
    search = FastICA(whiten=False, max_iter=ITERATIONS, tol=TOLERANCE, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(white.numpy())
    logger.info("independent components: %d iterations", search.n_iter_)
    rotation = _orthogonal(torch.from_numpy(search.components_).T.double())  # W'
    rotation *= torch.where((white @ rotation.float()).pow(3).mean(0) < 0, -1, 1)
    return _dictionary((axes / deviations) @ rotation, rotation.T @ (axes * deviations).T, mean)


def pca(states: Array, components: int) -> AffineDictionary:
    """The first principal components of states (n, d): orthonormal directions, the largest variance first.

    Raises ValueError when the states do not vary in so many dimensions.
    """
    mean, axes, _ = _principal(matrix(states, "states"), components)
    return _dictionary(axes, axes.T, mean)


def contrast(positive: Array, negative: Array) -> AffineDictionary:
    """One unit direction, from the mean of `negative` (m, d), where its feature is zero, to that of `positive` (n, d).

    Raises ValueError when the means are equal.
    """
    towards = matrix(positive, "positive")
    mean = matrix(negative, "negative", width=towards.shape[1]).mean(0)
    difference = towards.mean(0) - mean
    if not bool(difference.any()):
        raise ValueError("positive and negative have the same mean: there is no direction between them.")
    direction = (difference / difference.norm())[:, None]
    return _dictionary(direction, direction.T, mean)


def _principal(x: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), principal axes (d, components) and the standard deviations along them."""
    if not 1 <= components <= x.shape[1]:
        raise ValueError(f"components must lie between 1 and the {x.shape[1]} dimensions, got {components}.")
    mean = x.mean(0)
    variances, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    variances, axes = variances.flip(0), axes.flip(1)
    rank = int((variances > RANK * variances[0]).sum())
    if rank < components:
        raise ValueError(f"The {len(x)} states vary in {rank} dimensions only; {components} components were asked for.")
    return mean, axes[:, :components], variances[:components].sqrt()


def _orthogonal(square: Tensor) -> Tensor:
    """The orthogonal matrix nearest to one that is so up to rounding."""
    left, _, right = torch.linalg.svd(square)
    return left @ right


def _dictionary(read: Tensor, write: Tensor, mean: Tensor) -> AffineDictionary:
    return AffineDictionary(read.float().contiguous(), write.float().contiguous(), mean.float())
