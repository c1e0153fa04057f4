"""The closed form of the methods that edit what a linear layer makes of given rows (UCE and its successors).

minimise over W':  sum_i a_i |W' c_i - v_i|^2 + sum_j b_j |W' r_j - W r_j|^2 + ridge |W' - W|^2

has the solution  W' = W + (V - W C) L  with  L = A C' (ridge I + C A C' + R B R')^-1, where A and B are the weights as
diagonal matrices. L does not depend on W, so one solve serves every layer. Where v_i = W t_i, all layers share one map:
W' = W T with T = I + (T_c - C) L, the columns of T_c being the t_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.geometry.arrays import Array, finite, matrix
from conceptx.geometry.map import ConceptMap, capped
from conceptx.geometry.ridge import DenseMetric, eigenvalue_floor


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Rows (n, d) and how much each counts (n,): the squared error of row i is multiplied by weight i.

    Raises ValueError for weights that do not fit the rows or are not positive, NaN or infinity.
    """

    rows: Float[Tensor, "n d"]
    weights: Float[Tensor, ...]  # (n,), checked below

    def __post_init__(self) -> None:
        if self.weights.shape != self.rows.shape[:1]:
            shapes = f"{tuple(self.rows.shape)} and {tuple(self.weights.shape)}"
            raise ValueError(f"Rows (n, d) and weights (n,) do not fit, got {shapes}.")
        finite(self.rows, "rows")
        if not bool((self.weights > 0).all() and self.weights.isfinite().all()):
            raise ValueError("The weights must be positive and finite.")

    @staticmethod
    def of(rows: Array, weight: float = 1.0) -> WeightedRows:
        """All rows (n, d) with the same weight, in the working dtype."""
        working = matrix(rows, "rows")
        return WeightedRows(working, torch.full_like(working[:, 0], weight))

    @staticmethod
    def of_gram(gram: Float[Tensor, "d d"], weight: float = 1.0) -> WeightedRows:
        """At most d rows F with F'F = gram: what any number of rows with these second moments count for.

        A solve sees of retained rows only their weighted Gram matrix, so the moments of a whole corpus stand in for it.
        Raises ValueError when the matrix is not positive semi-definite (beyond rounding) or is zero.
        """
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        if values[0] < -eigenvalue_floor(values):
            raise ValueError(f"Second moments cannot have a negative eigenvalue, got {float(values[0]):.2e}.")
        kept = values > eigenvalue_floor(values)
        if not bool(kept.any()):
            raise ValueError("The second moments are zero; there is nothing to retain in them.")
        return WeightedRows.of((vectors[:, kept] * values[kept].sqrt()).T, weight)

    @property
    def scaled(self) -> Float[Tensor, "n d"]:
        """Rows times the roots of their weights: scaled' scaled is the weighted Gram matrix."""
        return self.rows * self.weights.sqrt()[:, None]

    def merged(self) -> tuple[WeightedRows, Int[Tensor, " n"]]:
        """Equal rows once, sorted, with their weights added; and the place of each old row among the new ones."""
        rows, place = self.rows.unique(dim=0, return_inverse=True)
        return WeightedRows(rows, self.weights.new_zeros(len(rows)).index_add_(0, place, self.weights)), place


def weighted_dual(keys: WeightedRows, retained: WeightedRows | None, ridge: float) -> Float[Tensor, "k d"]:
    """L = A C' (ridge I + C A C' + R B R')^-1 for keys C' (k, d) with weights A and retained rows R' with weights B.

    It equals `dual` of the keys in the metric ridge I + R B R', solved in the smaller of two systems: d x d as written,
    or n x n with all n weighted rows F' = (C A^1/2, R B^1/2)': L = A^1/2 E (ridge I + F'F)^-1 F', E the first k rows.
    Raises ValueError when the ridge is not positive or the widths differ.
    """
    if not ridge > 0:
        raise ValueError(f"The ridge must be positive, got {ridge}.")
    factor = keys.scaled if retained is None else torch.cat([keys.scaled, retained.scaled])
    count, width = factor.shape
    identity = torch.eye(min(count, width), dtype=factor.dtype, device=factor.device)
    if count >= width:
        weighted = keys.rows * keys.weights[:, None]
        return DenseMetric(ridge * identity + factor.T @ factor).solve(weighted.T).T
    inverse = DenseMetric(ridge * identity + factor @ factor.T).solve(identity[:, : len(keys.rows)])
    return keys.weights.sqrt()[:, None] * (inverse.T @ factor)


def replacement(
    keys: WeightedRows, targets: Float[Tensor, "n d"], retained: WeightedRows | None, ridge: float
) -> ConceptMap:
    """The map T = I + (T_c - C) L that takes each key to its target and keeps the retained rows, as far as they agree.

    W T minimises the module's objective with v_i = W t_i for every W at once. Equal keys are merged: their weights add
    up and their targets are averaged, which changes nothing. The rank is the number of keys, at most d.
    Raises ValueError for shapes that do not fit, a ridge that is not positive, NaN or infinity.
    """
    if targets.shape != keys.rows.shape:
        raise ValueError(f"{len(keys.rows)} keys need as many targets, got {tuple(targets.shape)}.")
    merged, place = keys.merged()
    changes = (targets - keys.rows) * keys.weights[:, None]
    changes = torch.zeros_like(merged.rows).index_add_(0, place, changes) / merged.weights[:, None]
    read = weighted_dual(merged, retained.merged()[0] if retained else None, ridge)
    return ConceptMap(*capped(changes.T, read), torch.zeros_like(read[0]))
