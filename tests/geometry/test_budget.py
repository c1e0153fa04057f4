"""The smallest edit within a budget, or a proof that there is none: against closed forms and the full d x d program."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conceptx.geometry import ConceptMap, budget
from conceptx.geometry.budget import Budget, Certificate

sizes = st.tuples(st.integers(3, 10), st.integers(1, 3), st.integers(0, 12))  # d, keys, retained: more than d too
limits = st.tuples(st.sampled_from([0.0, 0.02, 0.2]), st.sampled_from([0.0, 0.1, 0.5]))
# The solver's accuracy in units of a row, times the entries of an edit of norm at most about 10
SOLVED = {"rtol": 0, "atol": 1e-5}


def draw(seed, size, drift=0.02, distance=0.1, largest=100.0):
    d, m, n = size
    return Budget(random(seed, m, d), random(seed + 1, m, d), random(seed + 2, n, d), drift, distance, largest)


def matrix(edit):
    return edit.write @ edit.read


def shares(task, change):
    """|M r| / |r|, and |M c - D| / |D|, row by row."""
    drift = [float((change @ row).norm() / row.norm()) for row in task.retained]
    wanted = task.targets - task.keys
    left = [float((change @ c - w).norm() / w.norm()) for c, w in zip(task.keys, wanted, strict=True)]
    return drift, left


@settings(max_examples=40)
@given(seeds, sizes, limits)
def test_there_is_an_edit_within_the_budget_or_a_proof_that_there_is_none(seed, size, limit):
    task = draw(seed, size, *limit)
    found = task.smallest()
    if isinstance(found, ConceptMap):
        drift, left = shares(task, matrix(found))
        assert max(drift, default=0) <= task.drift + 1e-6 and max(left) <= task.distance + 1e-6
        assert found.rank <= size[1]
        over = max([*(x - task.drift for x in drift), *(x - task.distance for x in left)])
        assert task.excess(found) == pytest.approx(over, abs=1e-12)
    else:
        assert found.bound > task.distance and proves(found)


def proves(proof):
    """The bound from the multipliers alone, by the inequality: no part of the solver, another way to write it."""
    task, budget_left = proof.budget, 1.0
    wanted = task.targets - task.keys
    total = sum(float(u.norm()) for u in proof.toward)
    form = np.zeros((task.keys.shape[1],) * 2)  # E
    for u, c, w in zip(proof.toward, task.keys, wanted, strict=True):
        form += np.outer(u, c) / float(w.norm())
        budget_left -= float(u.norm()) / max(total, 1)
    for v, r in zip(proof.against, task.retained, strict=True):
        form += np.outer(v, r) / float(r.norm())
    least = -sum(float(u @ w / w.norm()) for u, w in zip(proof.toward, wanted, strict=True))
    least -= task.drift * sum(float(v.norm()) for v in proof.against) + task.largest * np.linalg.norm(form)
    assert budget_left > -1e-12  # sum |u| <= 1
    return proof.bound == pytest.approx(least / max(total, 1), abs=1e-9)


@given(seeds, sizes, st.floats(0, 0.5), st.integers(0, 1000))
def test_whatever_the_multipliers_a_certificate_proves_no_more_than_is_true(seed, size, drift, more):
    """Any edit of the allowed drift and size leaves some key at least `bound` away: here a small and a random one."""
    task = draw(seed, size, drift, largest=2.0)
    proof = Certificate(task, random(more, *task.keys.shape), random(more + 1, *task.retained.shape))
    d = size[0]
    change = random(more + 2, d, d)
    moved = max(shares(task, change)[0], default=0)
    change *= min(2 / float(change.norm()), drift / moved if moved else np.inf)
    for allowed in (change, torch.zeros(d, d).double()):
        assert max(shares(task, allowed)[1]) >= proof.bound - 1e-12


def full_program(task):
    """The issue's program as it is written, in all d x d unknowns."""
    d = task.keys.shape[1]
    change = cp.Variable((d, d))
    limits = [cp.norm(change @ r) <= task.drift * np.linalg.norm(r) for r in task.retained.numpy()]
    for c, t in zip(task.keys.numpy(), task.targets.numpy(), strict=True):
        limits.append(cp.norm(change @ c + c - t) <= task.distance * np.linalg.norm(t - c))
    problem = cp.Problem(cp.Minimize(cp.norm(change, "fro")), limits)
    problem.solve(solver="CLARABEL")
    return problem.status, change.value


@settings(max_examples=8)
@given(seeds, st.tuples(st.integers(3, 5), st.integers(1, 2), st.integers(0, 3)))
def test_the_small_program_has_the_solution_of_the_full_one(seed, size):
    task = draw(seed, size, 0.05, 0.2)
    found, (status, expected) = task.smallest(), full_program(task)
    if isinstance(found, Certificate):
        assert status == "infeasible" or np.linalg.norm(expected) > 99
    else:
        assume(np.linalg.norm(expected) < 20)  # nearly dependent rows multiply the solvers' errors
        np.testing.assert_allclose(matrix(found), expected, rtol=0, atol=1e-3)  # the root of the error of the norm
        assert float(matrix(found).norm()) == pytest.approx(np.linalg.norm(expected), rel=1e-5)


@given(seeds, st.integers(2, 10), st.floats(0, 0.9))
def test_with_nothing_retained_one_key_goes_just_as_far_as_it_must(seed, d, distance):
    """The smallest M with M c = (1 - distance) D is (1 - distance) D c' / |c|^2."""
    task = draw(seed, (d, 1, 0), distance=distance)
    (c,), (wanted,) = task.keys, task.changes
    expected = (1 - distance) * torch.outer(wanted, c) / (c @ c)
    torch.testing.assert_close(matrix(task.smallest()), expected, **SOLVED)


@given(seeds, st.integers(4, 10), st.integers(1, 3), st.integers(1, 3))
def test_where_nothing_may_drift_the_keys_move_by_what_the_retained_rows_do_not_share(seed, d, m, n):
    """With drift and distance 0, M = D' K^+ for the keys K without their part in the span of the retained rows."""
    assume(m + n < d)
    task = draw(seed, (d, m, n), 0.0, 0.0)
    retained = torch.linalg.qr(task.retained.T).Q
    rest = task.keys - task.keys @ retained @ retained.T
    expected = task.changes.T @ torch.linalg.pinv(rest.T)
    assume(float(expected.norm()) < 20)
    found = matrix(task.smallest())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # 1e-6 of each row, times an edit of 20


@given(seeds, st.integers(3, 8), st.floats(0.01, 0.5))
def test_one_key_along_a_retained_row_can_come_as_close_as_that_row_may_drift(seed, d, drift):
    """c = r: |M c| <= drift |c|, so at least 1 - drift |c| / |D| of the distance is left; the proof names the row."""
    row, target, other = random(seed, 1, d), random(seed + 1, 1, d), random(seed + 2, 1, d)
    task = Budget(row, target, torch.cat([other, row]), drift, 0.0)
    reachable = 1 - drift * float(row.norm() / (target - row).norm())
    assume(reachable > 0.05)
    proof = task.smallest()
    assert isinstance(proof, Certificate) and proof.bound == pytest.approx(reachable, abs=1e-4)
    assert int(proof.forbidding.argmax()) == 1
    # for each unit of drift the key comes closer by |c| / |D|
    assert float(proof.forbidding[1]) == pytest.approx(float(row.norm() / (target - row).norm()), rel=1e-3)
    assert float(proof.kept_away.sum()) == pytest.approx(1, abs=1e-3)


def test_a_key_in_the_span_of_two_retained_rows_is_forbidden_by_both():
    first, second, target = torch.eye(6).double()[:3].split(1)
    proof = Budget(first + second, target, torch.cat([first, second]), 0.0, 0.5).smallest()
    assert isinstance(proof, Certificate) and proof.bound == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(proof.forbidding[0], proof.forbidding[1], rtol=1e-3, atol=0)


def test_a_small_edit_may_be_forbidden_by_its_size_alone():
    task = draw(0, (6, 1, 0), distance=0.1, largest=0.2)
    (c,), (wanted,) = task.keys, task.changes
    proof = task.smallest()
    assert isinstance(proof, Certificate)  # M c = 0.2 |c| D / |D| is all there is
    assert proof.bound == pytest.approx(1 - 0.2 * float(c.norm() / wanted.norm()), abs=1e-6)


@given(seeds, st.tuples(st.integers(4, 8), st.integers(1, 2), st.integers(1, 6)))
def test_a_wider_budget_needs_no_larger_edit(seed, size):
    sizes = []
    for drift, distance in ((0.05, 0.1), (0.1, 0.1), (0.1, 0.3)):
        found = draw(seed, size, drift, distance).smallest()
        sizes.append(np.inf if isinstance(found, Certificate) else float(matrix(found).norm()))
    assert sizes[1] <= sizes[0] * (1 + 1e-5) and sizes[2] <= sizes[1] * (1 + 1e-5)


def test_nearly_dependent_rows_are_still_solved():
    """105 of them in 384 dimensions, which differ little beside 30 directions, as the names of a text encoder do."""
    base, parts = 3 * random(0, 1, 384), random(1, 30, 384)
    names = base + random(2, 107, 30) @ parts + 1e-2 * random(3, 107, 384)
    found = Budget(names[:1], names[1:2], names[2:], 0.01, 0.1, 1000.0).smallest()
    drift, left = shares(Budget(names[:1], names[1:2], names[2:], 0.01, 0.1), matrix(found))
    assert max(drift) <= 0.01 + 1e-6 and max(left) <= 0.1 + 1e-6


def test_the_next_solver_goes_on_where_one_is_inaccurate(monkeypatch):
    task = draw(0, (8, 2, 5))
    expected = matrix(task.smallest())
    hopeless = {"eps_abs": 1e-12, "max_iters": 1}
    monkeypatch.setattr(budget, "SOLVERS", {"SCS": hopeless, "CLARABEL": budget.SOLVERS["CLARABEL"]})
    torch.testing.assert_close(matrix(task.smallest()), expected, **SOLVED)
    monkeypatch.setattr(budget, "SOLVERS", {"SCS": hopeless})
    with pytest.raises(FloatingPointError, match=r"No solver kept the budget to 1e-06 of a row's length, but to"):
        task.smallest()


def test_errors_say_what_is_wrong():
    row, other = random(0, 1, 4), random(1, 2, 4)
    with pytest.raises(ValueError, match=r"Keys \(m, d\), targets \(m, d\) and retained rows \(n, d\) do not fit"):
        Budget(row, other, other, 0.1, 0.1)
    with pytest.raises(ValueError, match="must be finite and not negative"):
        Budget(row, other[:1], other, -0.1, 0.1)
    with pytest.raises(ValueError, match="no key its own target"):
        Budget(row, row, other, 0.1, 0.1)
    with pytest.raises(ValueError, match="A retained row must not be zero"):
        Budget(row, other[:1], 0 * other, 0.1, 0.1)
    with pytest.raises(ValueError, match="targets has 4 NaN"):
        Budget(row, 0 * row / 0, other, 0.1, 0.1)
