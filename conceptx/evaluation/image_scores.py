"""The arithmetic of image scores: shares and means with their 95 % intervals, the harmonic mean, Fréchet distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

NORMAL = NormalDist().inv_cdf(0.975)  # 1.96
BLOCKS = 10  # of the jackknife


@dataclass(frozen=True)
class Estimate:
    """A value from n items, its standard error where it has one, and the limits of its 95 % interval."""

    value: float
    n: int
    low: float
    high: float
    error: float | None = None


def share(hits: Shaped[Tensor, " n"]) -> Estimate:
    """The share of true items with Wilson's interval, which neither leaves [0, 1] nor closes up at 0 and 1."""
    n = _count(hits)
    value = float(hits.double().mean())
    centre = (value + NORMAL**2 / (2 * n)) / (1 + NORMAL**2 / n)
    half = NORMAL / (1 + NORMAL**2 / n) * math.sqrt(value * (1 - value) / n + NORMAL**2 / (4 * n**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(value, n, min(low, value), max(high, value), math.sqrt(value * (1 - value) / n))


def mean(values: Float[Tensor, " n"]) -> Estimate:
    """The mean with the normal interval."""
    n = _count(values, 2)
    value = float(values.double().mean())
    error = float(values.double().std()) / n**0.5
    return Estimate(value, n, value - NORMAL * error, value + NORMAL * error, error)


def _count(values: Tensor, least: int = 1) -> int:
    if len(values) < least:
        raise ValueError(f"An interval needs at least {least} pictures, got {len(values)}.")
    return len(values)


# -- the harmonic mean -----------------------------------------------------------------------------------------


def harmonic_mean(shares: Sequence[float]) -> float:
    """k / (1/x_1 + ... + 1/x_k); 0 when one of them is 0."""
    return 0.0 if min(shares) <= 0 else len(shares) / sum(1 / x for x in shares)


def overall(erased: Estimate, kept: Estimate, general: Estimate | None = None) -> Estimate:
    """H_o of MACE (arXiv 2403.06135): the harmonic mean of 1 - Acc_e, Acc_s and, where it is measured, 1 - Acc_g.

    Its interval: each share in turn is moved to its own lower (upper) limit; the drops (rises) of H_o are added as
    independent errors are, in squares.  n counts all items.
    """
    parts = [_rest(erased), kept, *([] if general is None else [_rest(general)])]
    value = harmonic_mean([part.value for part in parts])
    low = value - _moved(parts, value, [part.low for part in parts])
    high = value + _moved(parts, value, [part.high for part in parts])
    return Estimate(value, sum(part.n for part in parts), max(0.0, low), min(1.0, high))


def _rest(part: Estimate) -> Estimate:
    return replace(part, value=1 - part.value, low=1 - part.high, high=1 - part.low)


def _moved(parts: Sequence[Estimate], value: float, limits: Sequence[float]) -> float:
    """How far the harmonic mean moves when each part goes to its limit alone: the root of the sum of squares."""
    values = [part.value for part in parts]
    moved = [harmonic_mean([*values[:i], limit, *values[i + 1 :]]) for i, limit in enumerate(limits)]
    return math.hypot(*(other - value for other in moved))


# -- the Fréchet distance --------------------------------------------------------------------------------------


def frechet(first: Float[Tensor, "n f"], second: Float[Tensor, "m f"]) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½) of the normal distributions with the moments of two sets.

    The Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500) when the features are those of Inception; in
    float64, by two symmetric eigendecompositions, so that nothing complex has to be thrown away. Depends on n: only
    distances of sets of equal sizes can be compared.
    Raises ValueError when a set has fewer than two rows or the widths differ.
    """
    if first.shape[1:] != second.shape[1:] or min(len(first), len(second)) < 2:
        raise ValueError(
            "The Fréchet distance needs two sets of at least two rows of one width, "
            f"got shapes {tuple(first.shape)} and {tuple(second.shape)}."
        )
    first, second = first.double(), second.double()
    root = _root(torch.cov(first.T).reshape(first.shape[1], -1))
    spread = torch.cov(second.T).reshape(second.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ spread @ root).clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return max(0.0, float(gap + root.square().sum() + spread.trace() - 2 * cross))


def _root(spread: Float[Tensor, "f f"]) -> Float[Tensor, "f f"]:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(spread)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def paired_frechet(first: Float[Tensor, "n f"], second: Float[Tensor, "n f"]) -> Estimate:
    """The Fréchet distance of two sets whose rows belong together (one prompt and seed, before and after).

    Its interval is normal, by the jackknife that leaves out one of ten blocks of pairs at a time.
    """
    _count(first, 4)
    value = frechet(first, second)
    error = jackknife(lambda rows: frechet(first[rows], second[rows]), len(first))
    low, high = value - NORMAL * error, value + NORMAL * error
    return Estimate(value, len(first), max(0.0, low), high, error)


def jackknife(statistic: Callable[[Tensor], float], n: int, blocks: int = BLOCKS) -> float:
    """The standard error of a statistic of rows 0..n-1, from its values without each of `blocks` blocks of rows."""
    blocks = min(blocks, n)
    rows = torch.arange(n)
    without = torch.tensor([statistic(rows[rows % blocks != block]) for block in range(blocks)], dtype=torch.float64)
    return float(((blocks - 1) * (without - without.mean()).square().mean()).sqrt())
