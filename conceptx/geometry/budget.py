"""The smallest linear edit that keeps to a budget, or a proof that there is none: a second-order cone program.

    minimise |M|  subject to  |M r_j| <= drift |r_j|               for every retained row r_j,
                              |M c_i - D_i| <= distance |D_i|      for every key c_i, with D_i = t_i - c_i,
                              |M| <= largest,

where T = I + M is the edit, t_i the target of c_i, and |M| the Frobenius norm. Let P and Q project orthogonally onto
the span of the D_i and onto the span of all keys and retained rows. P M Q satisfies every constraint that M does, since
M Q r = M r for a row of that span, |P M r| <= |M r|, and P M c - D = P (M c - D); and it is no larger. So only
M = B X K' is looked for, with orthonormal bases B (d, p) and K (d, q) of the two spans: p q unknowns, p <= keys,
q <= keys + retained rows.

Whether the budget can be kept is asked first, by the smallest s with |M c_i - D_i| <= s |D_i| instead; M = 0 has s = 1.
For any vectors u_i and v_j with sum |u_i| <= 1, and E = sum u_i c_i' / |D_i| + sum v_j r_j' / |r_j|, every M has

    s >= sum <u_i, M c_i - D_i> / |D_i|  =  <E, M> - sum <v_j, M r_j> / |r_j| - sum <u_i, D_i> / |D_i|
      >= -largest |E| - drift sum |v_j| - sum <u_i, D_i> / |D_i|.

The dual solution makes this tight. It is the `Certificate`, which anybody can check without the solver.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import finite
from conceptx.geometry.map import ConceptMap

ACCURACY = 1e-6  # of a row's length: by how much the solver may miss a limit
# The first is many times faster on large problems, the second surer on nearly dependent rows.
SOLVERS: Mapping[str, Mapping[str, Any]] = {
    "SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 5000},
    "CLARABEL": {"direct_solve_method": "faer"},
}


@dataclass(frozen=True, eq=False)
class Budget:
    """What an edit T = I + M may do to retained rows, and how close it must bring keys to their targets.

    keys:     c (m, d), to be moved.  targets: t (m, d).  retained: r (n, d), perhaps none.
    drift:    |M r| <= drift |r|.
    distance: |T c - t| <= distance |t - c|.
    largest:  |M| <= largest, in the Frobenius norm; moving one key alone onto its target has |t - c| / |c|.

    Raises ValueError for shapes that do not fit, a limit that is not finite or negative, NaN or infinity, a row of
    zeros, or a key that is its own target.
    """

    keys: Float[Tensor, "m d"]
    targets: Float[Tensor, ...]  # (m, d), checked below
    retained: Float[Tensor, ...]  # (n, d), checked below
    drift: float
    distance: float
    largest: float = 100.0

    def __post_init__(self) -> None:
        shapes = [tuple(rows.shape) for rows in (self.keys, self.targets, self.retained)]
        if shapes[0] != shapes[1] or shapes[0][1:] != shapes[2][1:] or not shapes[0][0]:
            raise ValueError(f"Keys (m, d), targets (m, d) and retained rows (n, d) do not fit, got {shapes}.")
        if not all(0 <= limit < float("inf") for limit in (self.drift, self.distance, self.largest)):
            raise ValueError("The limits of a budget must be finite and not negative.")
        for name in ("keys", "targets", "retained"):
            finite(getattr(self, name), name)
        if not bool((_lengths(self.changes) > 0).all()) or not bool((_lengths(self.retained) > 0).all()):
            raise ValueError("A retained row must not be zero, and no key its own target.")

    @property
    def changes(self) -> Float[Tensor, "m d"]:
        """D."""
        return self.targets - self.keys

    def smallest(self) -> ConceptMap | Certificate:
        """The smallest edit within the budget, to an accuracy of 1e-6, or the proof that there is none.

        Raises ImportError when cvxpy is not installed, FloatingPointError when no solver reaches that accuracy.
        """
        program = _Program(self)
        reached, proof = program.closest()
        if proof.bound > self.distance + ACCURACY / 2:
            return proof
        edit = program.smallest(max(self.distance, reached + ACCURACY / 10))
        if (excess := self.excess(edit)) > ACCURACY:
            raise FloatingPointError(
                f"No solver kept the budget to {ACCURACY:g} of a row's length, but to {excess:.1e}."
            )
        return edit

    def excess(self, edit: ConceptMap) -> float:
        """By how much of its row's length, or of |D|, an edit oversteps the limit that it oversteps most."""
        change = edit.write @ edit.read
        missed = _lengths(self.keys @ change.T - self.changes) / _lengths(self.changes) - self.distance
        drifted = _lengths(self.retained @ change.T) / _lengths(self.retained) - self.drift
        return float(torch.cat([missed, drifted]).max())


@dataclass(frozen=True, eq=False)
class Certificate:
    """A proof that no edit within the drift and the size of a budget brings every key closer than `bound`.

    toward: u (m, d), the multipliers of the keys.
    against: v (n, d), those of the retained rows: what forbids it.
    Any values prove something; those of the dual solution prove the most.
    """

    budget: Budget
    toward: Float[Tensor, "m d"]
    against: Float[Tensor, "n d"]

    @cached_property
    def bound(self) -> float:
        """For every such edit some |T c_i - t_i| >= bound |t_i - c_i|, by the inequality at the top of this file."""
        budget, size = self.budget, _lengths(self.budget.changes)
        scale = 1 / max(1.0, float(_lengths(self.toward).sum()))
        rest = self.toward.T @ (budget.keys / size) + self.against.T @ (budget.retained / _lengths(budget.retained))
        gain = -(self.toward * budget.changes / size).sum()
        cost = budget.drift * _lengths(self.against).sum() + budget.largest * torch.linalg.matrix_norm(rest)
        return scale * float(gain - cost)

    @property
    def forbidding(self) -> Float[Tensor, " n"]:
        """How much closer the keys could come for each unit of drift that a retained row were given more."""
        return _lengths(self.against)[:, 0]

    @property
    def kept_away(self) -> Float[Tensor, " m"]:
        """The share of each key in the bound."""
        return _lengths(self.toward)[:, 0]


class _Program:
    """Both programs in the coordinates X (p, q), with every constraint in units of its row."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.columns = torch.linalg.qr(budget.changes.T).Q  # B
        self.rows = torch.linalg.qr(torch.cat([budget.keys, budget.retained]).T).Q  # K
        size = _lengths(budget.changes)
        self.keys = (budget.keys / size @ self.rows).numpy(force=True)
        self.changes = (budget.changes / size @ self.columns).numpy(force=True)
        self.retained = (budget.retained / _lengths(budget.retained) @ self.rows).numpy(force=True)
        self.cp = _cvxpy()
        self.unknown = self.cp.Variable((self.columns.shape[1], self.rows.shape[1]))  # X

    def closest(self) -> tuple[float, Certificate]:
        """The smallest s, and the proof that it is."""
        reached = self.cp.Variable()
        far = self._within(self.unknown @ self.keys.T - self.changes.T, reached)
        near, size = self._drift(), self._within(self.cp.vec(self.unknown, order="F")[:, None], self.budget.largest)
        self._solve(reached, [far, *near, size])
        toward, *against = (self._lifted(_multipliers(constraint)) for constraint in (far, *near))
        proof = Certificate(self.budget, toward, *(against or [torch.zeros_like(self.budget.retained)]))
        return float(reached.value), proof

    def smallest(self, distance: float) -> ConceptMap:
        """The smallest edit."""
        far = self._within(self.unknown @ self.keys.T - self.changes.T, distance)
        self._solve(self.cp.sum_squares(self.unknown), [far, *self._drift()])
        read = self._tensor(self.unknown.value) @ self.rows.T
        return ConceptMap(self.columns, read, torch.zeros_like(read[0]))

    def _drift(self) -> list[Any]:
        return [self._within(self.unknown @ self.retained.T, self.budget.drift)] if len(self.retained) else []

    def _within(self, columns: Any, limit: Any) -> Any:
        """Every column is at most as long as the limit; a cone has no inside where that is zero, an equation has."""
        if isinstance(limit, float) and limit == 0:
            return columns == 0
        return self.cp.SOC(limit * np.ones(columns.shape[1]), columns, axis=0)

    def _solve(self, objective: Any, constraints: list[Any]) -> None:
        """With the first solver that calls its answer accurate, or else the last one."""
        problem = self.cp.Problem(self.cp.Minimize(objective), constraints)
        for solver, options in SOLVERS.items():
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is inaccurate
                problem.solve(solver=solver, **options)
            if problem.status == self.cp.OPTIMAL:
                return

    def _lifted(self, multipliers: np.ndarray) -> Tensor:
        """(p, n) in coordinates -> (n, d)"""
        return (self.columns @ self._tensor(multipliers)).T

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=self.columns.dtype, device=self.columns.device)


def _multipliers(constraint: Any) -> np.ndarray:
    """(p, n), signed as in the inequality: cvxpy takes a cone's product off the Lagrangian and adds an equation's."""
    found = constraint.dual_value
    return found if isinstance(found, np.ndarray) else -np.asarray(found[1]).reshape(constraint.args[1].shape)


def _lengths(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _cvxpy() -> Any:
    try:
        import cvxpy
    except ImportError:
        raise ImportError("Budgeted erasure needs cvxpy: pip install 'conceptx[convex]'.") from None
    return cvxpy
