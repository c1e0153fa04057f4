"""First and second moments of (x, z) pairs, streamed and merged: shards, batches and processes combine exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, means and centred scatter matrices of x (d) and z (k). Values add: `a + b` are the moments of both.

    Accumulated in the dtype of the tensors given (the library gives float64). Merging follows Chan, Golub and
    LeVeque (1979).
    """

    count: int
    mean_x: Float[Tensor, " d"]
    mean_z: Float[Tensor, " k"]
    scatter_xx: Float[Tensor, "d d"]
    scatter_xz: Float[Tensor, "d k"]
    scatter_zz: Float[Tensor, "k k"]

    @staticmethod
    def of(x: Float[Tensor, "n d"], z: Float[Tensor, "n k"]) -> Moments:
        """The moments of one batch. Raises ValueError when x and z have different lengths or none."""
        if len(x) != len(z) or not len(x):
            raise ValueError(f"x and z must have the same positive number of rows, got {len(x)} and {len(z)}.")
        mean_x, mean_z = x.mean(0), z.mean(0)
        dx, dz = x - mean_x, z - mean_z
        return Moments(len(x), mean_x, mean_z, dx.T @ dx, dx.T @ dz, dz.T @ dz)

    @staticmethod
    def stream(batches: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        """The moments of many batches. Raises ValueError when there is none."""
        parts = (Moments.of(x, z) for x, z in batches)
        first = next(parts, None)
        if first is None:
            raise ValueError("No batch was given.")
        return reduce(add, parts, first)

    def __add__(self, other: Moments) -> Moments:
        if self.mean_x.shape != other.mean_x.shape or self.mean_z.shape != other.mean_z.shape:
            raise ValueError("Moments of different dimensions cannot be added.")
        count = self.count + other.count
        share = other.count / count
        dx, dz = other.mean_x - self.mean_x, other.mean_z - self.mean_z
        between = self.count * share  # n_a n_b / (n_a + n_b)
        return Moments(
            count,
            self.mean_x + share * dx,
            self.mean_z + share * dz,
            self.scatter_xx + other.scatter_xx + between * torch.outer(dx, dx),
            self.scatter_xz + other.scatter_xz + between * torch.outer(dx, dz),
            self.scatter_zz + other.scatter_zz + between * torch.outer(dz, dz),
        )

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Sigma_xx, divided by count - 1."""
        return self.scatter_xx / max(self.count - 1, 1)

    @property
    def cross_covariance(self) -> Float[Tensor, "d k"]:
        """Sigma_xz, divided by count - 1."""
        return self.scatter_xz / max(self.count - 1, 1)
