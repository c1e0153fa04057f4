"""The Fantope {A : 0 <= A <= I, tr A = k}: the convex hull of the rank-k orthogonal projections."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def project_fantope(matrix: Float[Tensor, "d d"], rank: int) -> Float[Tensor, "d d"]:
    """The nearest point of the Fantope in Frobenius norm (Vu et al. 2013; R-LACE, Lemma C.1).

    The eigenvalues become min(max(lambda - gamma, 0), 1) with gamma such that they sum to the rank.
    Raises ValueError unless 1 <= rank <= d.
    """
    d = matrix.shape[0]
    if not 1 <= rank <= d:
        raise ValueError(f"The rank must lie between 1 and the dimension {d}, got {rank}.")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * waterfill(values, rank)) @ vectors.T


def waterfill(values: Float[Tensor, " d"], total: int) -> Float[Tensor, " d"]:
    """min(max(values - gamma, 0), 1) with the gamma that makes the sum equal to `total`, found exactly.

    The sum is piecewise linear and falls in gamma, with corners where a value leaves 1 or reaches 0.
    """
    corners = torch.cat([values, values - 1]).sort().values  # gamma ascending, sums descending from d to 0
    sums = (values[None] - corners[:, None]).clamp(0, 1).sum(1)
    right = int((sums > total).sum().clamp(1, len(corners) - 1))  # the first corner with sum <= total
    left = right - 1
    drop = sums[left] - sums[right]
    step = (sums[left] - total) / drop if drop > 0 else torch.zeros_like(drop)
    gamma = corners[left] + step * (corners[right] - corners[left])
    return (values - gamma).clamp(0, 1)
