"""A concept in a vector space: where it lives (basis), how much of it is in x (dual), where it is zero (mean)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import Array, ArrayT, finite, like, to_working
from conceptx.geometry.map import ConceptMap
from conceptx.geometry.ridge import Metric, dual
from conceptx.store import load_tensors, save_tensors


@dataclass(frozen=True, eq=False)
class Subspace:
    """K, L and mu with L K = I: coordinates(x) = L(x - mu), the concept's part of x is K L(x - mu).

    basis: K (d, k).  dual: L (k, d).  mean: mu (d,).
    Orthogonal when L = K' (R-LACE, INLP), oblique in a metric otherwise (LEACE: the covariance).
    Raises ValueError for shapes that do not fit, k > d, NaN or infinity, or a dual that is not one (L K != I).
    """

    basis: Float[Tensor, "d k"]
    dual: Float[Tensor, "k d"]
    mean: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or not 1 <= self.basis.shape[1] <= self.basis.shape[0]:
            raise ValueError(f"The basis must be (d, k) with 1 <= k <= d, got {tuple(self.basis.shape)}.")
        d, k = self.basis.shape
        if self.dual.shape != (k, d) or self.mean.shape != (d,):
            raise ValueError(
                f"For a basis ({d}, {k}) the dual must be ({k}, {d}) and the mean ({d},), "
                f"got {tuple(self.dual.shape)} and {tuple(self.mean.shape)}."
            )
        for name in ("basis", "dual", "mean"):
            finite(getattr(self, name), name)
        off = float(
            (self.dual @ self.basis - torch.eye(k, dtype=self.basis.dtype, device=self.basis.device)).abs().max()
        )
        if off > 1e-5:  # far above rounding, also for ill-conditioned covariances
            raise ValueError(f"The dual is not a dual of the basis: L K differs from I by {off:.1e}.")

    # -- making one --------------------------------------------------------------------------------------------

    @staticmethod
    def orthogonal(basis: Array, mean: Array | None = None) -> Subspace:
        """The span of the columns of `basis` (d, k) with its orthogonal projection (basis made orthonormal).

        Raises ValueError when the columns are linearly dependent.
        """
        columns = finite(to_working(basis), "basis")
        if columns.ndim != 2 or not 1 <= columns.shape[1] <= columns.shape[0]:
            raise ValueError(f"The basis must be (d, k) with 1 <= k <= d, got {tuple(columns.shape)}.")
        left, singular, right = torch.linalg.svd(columns, full_matrices=False)
        if singular[-1] <= singular[0] * max(columns.shape) * torch.finfo(columns.dtype).eps:
            raise ValueError(f"The {columns.shape[1]} columns of the basis are linearly dependent.")
        orthonormal = left @ right  # the nearest orthonormal basis keeps the columns' signs
        return Subspace(orthonormal, orthonormal.T.contiguous(), _mean(mean, columns))

    @staticmethod
    def oblique(basis: Array, metric: Metric, mean: Array | None = None) -> Subspace:
        """The columns of `basis` (d, k) with their exact dual in the metric G: L = (K'G^-1 K)^-1 K'G^-1."""
        columns = finite(to_working(basis), "basis")
        return Subspace(columns, dual(columns, metric), _mean(mean, columns))

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def is_orthogonal(self) -> bool:
        """Whether removing it is an orthogonal projection (to 1e-9 of the basis' size)."""
        gap = torch.linalg.matrix_norm(self.dual.T @ torch.linalg.inv(self.dual @ self.dual.T) - self.basis)
        return bool(gap <= 1e-9 * torch.linalg.matrix_norm(self.basis))

    def coordinates(self, x: ArrayT) -> ArrayT:
        """L(x - mu) of shape (..., k) for x of shape (..., d)."""
        work = self._points(x)
        here = self.to(work.device)
        return like((work - here.mean) @ here.dual.T, x)

    def angles(self, other: Subspace) -> Float[Tensor, " m"]:
        """Principal angles between the two spans in radians, ascending, m = the smaller rank (Bjorck-Golub)."""
        if other.dim != self.dim:
            raise ValueError(f"Subspaces of different dimensions ({self.dim} and {other.dim}) have no angles.")
        mine, theirs = (torch.linalg.qr(s.basis).Q for s in (self, other.to(self.basis.device)))
        if mine.shape[1] < theirs.shape[1]:
            mine, theirs = theirs, mine
        cosines = torch.linalg.svdvals(mine.T @ theirs).clamp(max=1)
        sines = torch.linalg.svdvals(theirs - mine @ (mine.T @ theirs)).clamp(max=1).flip(0)
        return torch.where(cosines > 0.5**0.5, torch.asin(sines), torch.acos(cosines))

    # -- what it does ------------------------------------------------------------------------------------------

    def remove(self, x: ArrayT) -> ArrayT:
        """x without the concept: x - K L(x - mu). Idempotent; the mean stays; numpy or torch, same type out."""
        return self.removal()(x)

    def keep(self, x: ArrayT) -> ArrayT:
        """Only the concept: mu + K L(x - mu)."""
        work = self._points(x)
        here = self.to(work.device)
        return like(here.mean + ((work - here.mean) @ here.dual.T) @ here.basis.T, x)

    def replace(self, other: Subspace) -> ConceptMap:
        """The map that writes the other's basis where this one's was: x + (K_other - K) L(x - mu)."""
        if (other.dim, other.rank) != (self.dim, self.rank):
            raise ValueError(
                f"Only a subspace of dimension {self.dim} and rank {self.rank} can replace this one, "
                f"got {other.dim} and {other.rank}."
            )
        return ConceptMap(other.basis.to(self.basis.device) - self.basis, self.dual, self.mean)

    def removal(self) -> ConceptMap:
        """The map x - K L(x - mu)."""
        return ConceptMap(-self.basis, self.dual, self.mean)

    def linear(self) -> Subspace:
        """The same subspace through the origin (mu = 0), for layers that take no bias."""
        return Subspace(self.basis, self.dual, torch.zeros_like(self.mean))

    def complement(self) -> Subspace:
        """What `remove` leaves, as a subspace of rank d - k: complement().keep == remove."""
        if self.rank == self.dim:
            raise ValueError("A subspace that fills the space has no complement.")
        full = torch.linalg.qr(self.dual.T, mode="complete").Q
        null = full[:, self.rank :]  # orthonormal basis of ker L
        return Subspace(null, null.T - (null.T @ self.basis) @ self.dual, self.mean)

    def to(self, device: torch.device) -> Subspace:
        if self.basis.device == device:
            return self
        moved = (to_working(t.to(device)) for t in (self.basis, self.dual, self.mean))
        return Subspace(*moved)

    def _points(self, x: Array) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"The subspace lives in dimension {self.dim}, got vectors of {x.shape[-1]}.")
        return to_working(x)

    # -- on disk -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (to a temporary file first, then renamed)."""
        save_tensors(Path(path), {"basis": self.basis, "dual": self.dual, "mean": self.mean})

    @staticmethod
    def load(path: str | Path) -> Subspace:
        """Read what `save` wrote. Raises ValueError when the file is damaged or holds something else."""
        tensors = load_tensors(Path(path), expected=("basis", "dual", "mean"))
        return Subspace(tensors["basis"], tensors["dual"], tensors["mean"])


def _mean(mean: Array | None, columns: Tensor) -> Tensor:
    if mean is None:
        return torch.zeros(columns.shape[0], dtype=columns.dtype, device=columns.device)
    return finite(to_working(mean).to(columns.device), "mean")
