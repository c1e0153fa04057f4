"""The closed form with rows that come and go: `replacement` solved anew by updates of low rank.

The map T = I + (T_c - C) L of `closed_form` is I + N M^-1 with

    M = ridge I + sum_i a_i c_i c_i' + sum_j b_j r_j r_j',    N = sum_i a_i (t_i - c_i) c_i'.

Both are sums over rows, so rows enter and leave by themselves. With k weighted rows F (k, d), the rest of M^-1 follows
from (M +- F'F)^-1 = M^-1 -+ M^-1 F' (I +- F M^-1 F')^-1 F M^-1 (Woodbury): k x k systems instead of a solve with all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.closed_form import WeightedRows
from conceptx.geometry.map import ConceptMap


@dataclass(frozen=True, eq=False)
class RunningSolve:
    """The solve of `replacement` for the rows that are in it now; every verb returns another one.

    inverse: M^-1 (d, d).
    moved:   N (d, d).
    erased:  how many keys are in it.

    An update costs 2 k d^2 products; k rows more than d are first brought to d with the same F'F. What was added and is
    taken out again leaves an error of about 1e-16 (1 + |f|^2 / m), m what else M holds along the row f, ridge at least.
    """

    inverse: Float[Tensor, "d d"]
    moved: Float[Tensor, "d d"]
    erased: int = 0

    @staticmethod
    def start(width: int, ridge: float) -> RunningSolve:
        """No rows: T = I. Raises ValueError when the ridge is not positive."""
        if not ridge > 0:
            raise ValueError(f"The ridge must be positive, got {ridge}.")
        identity = torch.eye(width, dtype=torch.float64)
        return RunningSolve(identity / ridge, torch.zeros_like(identity))

    def add(self, keys: WeightedRows, targets: Float[Tensor, "k d"]) -> RunningSolve:
        """With these keys to be taken to their targets (k, d). Raises ValueError for shapes that do not fit."""
        return replace(self.retain(keys), moved=self.moved + _moved(keys, targets), erased=self.erased + len(targets))

    def remove(self, keys: WeightedRows, targets: Float[Tensor, "k d"]) -> RunningSolve:
        """Without these keys, which were added with the same weights and targets.

        Raises ValueError for shapes that do not fit, or when M would be singular: then they were not all in it.
        """
        if len(targets) > self.erased:
            raise ValueError(f"{len(targets)} keys cannot be taken out of a solve that holds {self.erased}.")
        return replace(self.release(keys), moved=self.moved - _moved(keys, targets), erased=self.erased - len(targets))

    def retain(self, rows: WeightedRows) -> RunningSolve:
        """With these rows to be kept, or kept with more weight."""
        factor, read = self._read(rows)
        lower = torch.linalg.cholesky(_identity(factor) + factor @ read.T)
        half = torch.linalg.solve_triangular(lower, read, upper=False)
        return replace(self, inverse=self.inverse - half.T @ half)

    def release(self, rows: WeightedRows) -> RunningSolve:
        """Without these rows, or with so much less weight on them.

        Raises ValueError when M would be singular: then they were not in it with so much weight.
        """
        factor, read = self._read(rows)
        lower, failed = torch.linalg.cholesky_ex(_identity(factor) - factor @ read.T)
        if failed or float(lower.diagonal().min()) ** 2 < 10 * len(lower) * torch.finfo(lower.dtype).eps:
            raise ValueError("These rows are not in the solve with such weights; without them it would be singular.")
        half = torch.linalg.solve_triangular(lower, read, upper=False)
        return replace(self, inverse=self.inverse + half.T @ half)

    def map(self) -> ConceptMap:
        """T, of rank min(keys, d) at most.

        With fewer keys than d: N = N Q Q' for an orthonormal basis Q of the rows of N. Q comes from products of N with
        random vectors, a few more than there are keys, which reach all of that span.
        """
        width = len(self.moved)
        if self.erased >= width:
            return ConceptMap(self.moved @ self.inverse, _identity(self.moved), self.moved.new_zeros(width))
        drawn = torch.randn(width, self.erased, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        basis = torch.linalg.qr(self.moved.T @ drawn.to(self.moved)).Q
        return ConceptMap(self.moved @ basis, basis.T @ self.inverse, self.moved.new_zeros(width))

    def _read(self, rows: WeightedRows) -> tuple[Tensor, Tensor]:
        """F (k, d) with k <= d, and F M^-1."""
        factor = rows.scaled
        if factor.shape[1] != len(self.inverse):
            raise ValueError(f"The solve has width {len(self.inverse)}, the rows have {factor.shape[1]}.")
        if len(factor) > len(self.inverse):
            factor = torch.linalg.qr(factor, mode="r").R
        return factor, factor @ self.inverse


def _moved(keys: WeightedRows, targets: Tensor) -> Tensor:
    if targets.shape != keys.rows.shape:
        raise ValueError(f"{len(keys.rows)} keys need as many targets, got {tuple(targets.shape)}.")
    return ((targets - keys.rows) * keys.weights[:, None]).T @ keys.rows


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
