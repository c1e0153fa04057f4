"""Random subspaces, metrics and points for the geometry tests, drawn by Hypothesis."""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from conceptx.geometry import DenseMetric, Subspace

settings.register_profile(
    "geometry",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,  # new examples are looked for at a desk, not where they would block a merge
)
settings.load_profile("geometry")

# Identities of float64 products of up to 12 x 12 matrices with entries and condition numbers of order 10 to 1e3:
# 1e-16 times the condition number times the length of the sums leaves three digits of room.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed: int, d: int) -> Tensor:
    factor = random(seed, d, 2 * d)
    return factor @ factor.T / (2 * d)


def make(seed: int, d: int, k: int, oblique: bool) -> Subspace:
    basis, mean = random(seed, d, k), random(seed + 1, d)
    if oblique:
        return Subspace.oblique(basis, DenseMetric(covariance(seed + 2, d)), mean)
    return Subspace.orthogonal(basis, mean)


def rounding(space: Subspace) -> dict[str, float]:
    """Tolerances for what follows from L K = I, for points of norm about 10.

    L solves the normal equations K'G^-1 K, whose condition is the SQUARE of the basis' own, which |K| |L| bounds up to
    the metric's; a square random basis may reach 1e4. So L K misses I by epsilon (|K| |L|)^2, and the identities as
    well, times the condition of G (below 1e3) and the points' norm.
    """
    size = float(torch.linalg.matrix_norm(space.basis, 2) * torch.linalg.matrix_norm(space.dual, 2))
    return {"rtol": 1e-10, "atol": 1e4 * torch.finfo(torch.float64).eps * size**2}


@st.composite
def subspaces(draw: st.DrawFn, *, proper: bool = True) -> Subspace:
    d = draw(st.integers(2, 12))
    k = draw(st.integers(1, d - 1 if proper else d))
    return make(draw(st.integers(0, 10_000)), d, k, draw(st.booleans()))


seeds = st.integers(0, 10_000)
