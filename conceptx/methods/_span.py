"""What the closed-form erasers share: how x varies with the labels, and which of those directions are real."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Correlations up to this are rounding: 1e-16 amplified by the root of the worst condition number that a Cholesky
# factor is accepted at (1e6 to 1e7), with a margin. A real correlation in n rows is about 1 / sqrt(n) or more.
ROUNDING = 1e-8


def standardise(
    cross: Float[Tensor, "d k"], variances: Float[Tensor, " k"], means: Float[Tensor, " k"]
) -> Float[Tensor, "d k"]:
    """Sigma_xz with every label column standardised, so that a rare label counts as much as a frequent one.

    For classes the columns span the differences of the class means. Raises ValueError when no label varies.
    """
    deviations = variances.sqrt()
    varies = deviations > 1e-13 * means.abs()  # a constant column has rounding, 1e-16 of its value
    if not bool(varies.any()):
        raise ValueError("The labels are the same in every row; a concept needs rows that differ.")
    return cross[:, varies] / deviations[varies]


def independent(columns: Float[Tensor, "d k"], scaled: Float[Tensor, "r k"]) -> Float[Tensor, "d m"]:
    """The span of the columns by m independent ones, strongest first; m is the rank of `scaled`.

    scaled: the same columns in units where 1 is a perfect correlation, so the tolerance depends on no scale.
    Raises ValueError when all of it is rounding.
    """
    _, singular, right = torch.linalg.svd(scaled, full_matrices=False)
    kept = singular > ROUNDING
    if not bool(kept.any()):
        raise ValueError("The labels have no linear trace in X: the class means are equal and nothing is to erase.")
    return columns @ (right[kept].T / singular[kept])


def mean_directions(x: Float[Tensor, "n d"], labels: Float[Tensor, "n k"]) -> Float[Tensor, "d m"]:
    """Independent directions that span the differences of the class means (Sigma_xz for continuous labels)."""
    centred, mean = x - x.mean(0), labels.mean(0)
    offsets = labels - mean
    columns = standardise(centred.T @ offsets / len(x), offsets.square().mean(0), mean)
    deviations = centred.square().mean(0).sqrt()[:, None]
    return independent(columns, torch.where(deviations > 0, columns / deviations, 0))  # correlations
