"""Whitening W = Sigma^-1/2 with its inverse, and linear shrinkage of a covariance from few samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.ridge import eigenvalue_floor


def whitening(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """(W, W^+): the symmetric square roots of the pseudo-inverse and of the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > eigenvalue_floor(values)
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    return (vectors / roots) @ vectors.T, (vectors * roots) @ vectors.T


def shrink(covariance: Float[Tensor, "d d"], count: int) -> Float[Tensor, "d d"]:
    """Optimal linear shrinkage towards a multiple of the identity (Bodnar, Gupta, Parolya 2014, arXiv 1308.2608).

    covariance: the sample covariance of `count` rows, divided by count - 1. The paper's S divides by count; the
    result is scaled back. The mixing weight is clipped to [0, 1], so the result stays positive semi-definite.
    """
    sample = covariance * ((count - 1) / count)
    d = sample.shape[0]
    trace, square = torch.trace(sample), (sample**2).sum()
    target_square = trace**2 / d  # ||(tr S / d) I||_F^2
    spread = square * target_square - target_square**2
    if spread <= torch.finfo(sample.dtype).eps * target_square**2:
        return covariance  # already a multiple of the identity
    weight = (1 - (trace**2 * target_square / count) / spread).clamp(0, 1)  # alpha
    target = (trace / d) * torch.eye(d, dtype=sample.dtype, device=sample.device)
    return (weight * sample + (1 - weight) * target) * (count / (count - 1))
