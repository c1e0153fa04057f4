"""The dual of a basis in a metric: L = (A^-1 + K'G^-1 K)^-1 K'G^-1, in Woodbury or d x d form, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DenseMetric:
    """A symmetric positive semi-definite metric G (d, d), for example a covariance.

    The diagonal is scaled to one first, so a coordinate in small units counts as much as any other. Then G is
    factorised by Cholesky or, where it is singular to working precision, by its eigenvalues above
    10 lambda_max * d * epsilon; `solve` is then a generalised inverse: exact on the range of G, zero off it.
    """

    matrix: Float[Tensor, "d d"]

    def solve(self, columns: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """G^-1 columns (G^- columns where G is singular)."""
        scaled = columns / self._scale[:, None]
        factor = self._cholesky
        solved = self._root @ (self._root.T @ scaled) if factor is None else torch.cholesky_solve(scaled, factor)
        return solved / self._scale[:, None]

    def whiten(self, columns: Float[Tensor, "d n"]) -> Float[Tensor, "r n"]:
        """Coordinates in which G is the identity: whiten(a)' whiten(b) = a' G^-1 b; r = rank G."""
        scaled = columns / self._scale[:, None]
        factor = self._cholesky
        return self._root.T @ scaled if factor is None else torch.linalg.solve_triangular(factor, scaled, upper=False)

    @cached_property
    def _scale(self) -> Tensor:
        roots = self.matrix.diagonal().clamp(min=0).sqrt()
        return torch.where(roots > 0, roots, 1)

    @cached_property
    def _unit(self) -> Tensor:
        """G with its diagonal scaled to one."""
        return self.matrix / torch.outer(self._scale, self._scale)

    @cached_property
    def _cholesky(self) -> Tensor | None:
        factor, info = torch.linalg.cholesky_ex(self._unit)
        if info != 0:
            return None
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        # 1 / |L^-1|^2 is at most the smallest eigenvalue; the pivots of a singular matrix can be large
        smallest, largest = 1 / inverse.square().sum(), torch.linalg.matrix_norm(self._unit)
        return factor if smallest > torch.finfo(factor.dtype).eps ** 0.75 * largest else None

    @cached_property
    def _root(self) -> Tensor:
        """R (d, r) with R R' the pseudo-inverse of the scaled G."""
        values, vectors = torch.linalg.eigh(self._unit)
        kept = values > eigenvalue_floor(values)
        return vectors[:, kept] / values[kept].sqrt()


@dataclass(frozen=True, eq=False)
class RetainMetric:
    """G = ridge I + weight R R' for the columns R (d, n) of what must be kept (none: a multiple of the identity).

    `solve` works in the n x n Woodbury form when n < d and in the d x d form otherwise; `form` forces one.
    Raises ValueError when the ridge is not positive.
    """

    ridge: float  # lambda
    retain: Float[Tensor, "d n"] | None = None  # R
    weight: float = 1.0  # beta
    form: str = "auto"

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"The ridge must be positive, got {self.ridge}.")
        if self.form not in ("auto", "woodbury", "dense"):
            raise ValueError(f"Unknown form {self.form!r}; available: auto, dense, woodbury.")

    def solve(self, columns: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """G^-1 columns."""
        if self.retain is None or self.weight == 0:
            return columns / self.ridge
        d, n = self.retain.shape
        small = self.form == "woodbury" or (self.form == "auto" and n < d)
        return self._woodbury(self.retain, columns) if small else self._dense.solve(columns)

    @cached_property
    def _dense(self) -> DenseMetric:
        assert self.retain is not None
        identity = torch.eye(self.retain.shape[0], dtype=self.retain.dtype, device=self.retain.device)
        return DenseMetric(self.ridge * identity + self.weight * self.retain @ self.retain.T)

    def _woodbury(self, retain: Tensor, columns: Tensor) -> Tensor:
        n = retain.shape[1]
        identity = torch.eye(n, dtype=retain.dtype, device=retain.device)
        inner = (self.ridge / self.weight) * identity + retain.T @ retain
        return (columns - retain @ torch.linalg.solve(inner, retain.T @ columns)) / self.ridge


Metric = DenseMetric | RetainMetric


def dual(
    basis: Float[Tensor, "d k"], metric: Metric, weights: Float[Tensor, " k"] | None = None
) -> Float[Tensor, "k d"]:
    """L = (A^-1 + K'G^-1 K)^-1 K'G^-1 for the basis K, the metric G and the erase weights A (None: infinite, LK = I).

    Raises ValueError when the basis is linearly dependent in the metric and no weights are given.
    """
    solved = metric.solve(basis)  # G^-1 K
    gram = basis.T @ solved
    if weights is not None:
        return torch.linalg.solve(torch.diag(1 / weights) + gram, solved.T)
    values = torch.linalg.eigvalsh(gram)
    if values[0] <= eigenvalue_floor(values):
        raise ValueError(
            f"The {basis.shape[1]} columns of the basis are linearly dependent in this metric "
            f"(smallest eigenvalue {float(values[0]):.2e}); remove columns or give finite erase weights."
        )
    return torch.linalg.solve(gram, solved.T)


def eigenvalue_floor(values: Float[Tensor, " n"]) -> Tensor:
    """Eigenvalues up to this are rounding: 10 lambda_max * n * epsilon.

    lambda_max * n * epsilon bounds the eigensolver's error alone; forming and scaling the matrix rounds as well.
    """
    return 10 * values.abs().max() * values.numel() * torch.finfo(values.dtype).eps
