"""The closed form of UCE and its successors: one solve for every layer, against numpy, cvxpy and the metric's dual."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from geometry.spaces import CLOSE, random, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptx.geometry import RetainMetric, WeightedRows, capped, dual, replacement, weighted_dual

sizes = st.tuples(st.integers(2, 12), st.integers(1, 8), st.integers(0, 8))  # d, keys, retained: n below and above d
ridges = st.floats(0.05, 5)


def draw(seed, d, k, n):
    """Keys, targets and retained rows with unequal weights."""
    weights = 0.1 + random(seed + 3, k + n).abs()
    retained = WeightedRows(random(seed + 2, n, d), weights[k:]) if n else None
    return WeightedRows(random(seed, k, d), weights[:k]), random(seed + 1, k, d), retained


def stacked(weight, keys, targets, retained, ridge):
    """The objective as one least-squares problem |X W' - Y|^2 in W' (d, out)."""
    rows, values, scales = [keys.rows], [targets @ weight.T], [keys.weights.sqrt()]
    if retained is not None:
        rows, values, scales = (
            [*rows, retained.rows], [*values, retained.rows @ weight.T], [*scales, retained.weights.sqrt()]
        )  # fmt: skip
    d = weight.shape[1]
    rows, values = [*rows, torch.eye(d).double()], [*values, weight.T]
    scale = torch.cat([*scales, torch.full((d,), ridge**0.5, dtype=torch.float64)])[:, None]
    return (scale * torch.cat(rows)).numpy(), (scale * torch.cat(values)).numpy()


@given(seeds, sizes, ridges)
def test_the_folded_map_is_the_least_squares_solution_of_every_layer(seed, size, ridge):
    keys, targets, retained = draw(seed, *size)
    shared = replacement(keys, targets, retained, ridge)
    for out in (1, 5):
        weight = random(seed + out, out, size[0])
        best = np.linalg.lstsq(*stacked(weight, keys, targets, retained, ridge), rcond=None)[0]
        np.testing.assert_allclose(shared.fold(weight)[0], best.T, **CLOSE)


def test_a_small_case_against_cvxpy():
    keys, targets, retained = draw(0, 6, 2, 3)
    weight, ridge = random(9, 3, 6), 0.5
    w = cp.Variable((3, 6))
    cost = ridge * cp.sum_squares(w - weight.numpy())
    for c, t, a in zip(keys.rows.numpy(), targets.numpy(), keys.weights, strict=True):
        cost += float(a) * cp.sum_squares(w @ c - weight.numpy() @ t)
    for r, b in zip(retained.rows.numpy(), retained.weights, strict=True):
        cost += float(b) * cp.sum_squares((w - weight.numpy()) @ r)
    cp.Problem(cp.Minimize(cost)).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    found = replacement(keys, targets, retained, ridge).fold(weight)[0].numpy()
    np.testing.assert_allclose(found, w.value, atol=1e-5)  # the square root of the solver's tolerance on the cost


@given(seeds, sizes, ridges)
def test_it_is_the_dual_of_the_keys_in_the_retain_metric(seed, size, ridge):
    keys, _, retained = draw(seed, *size)
    metric = RetainMetric(ridge, None if retained is None else retained.scaled.T)
    expected = dual(keys.rows.T, metric, keys.weights)
    torch.testing.assert_close(weighted_dual(keys, retained, ridge), expected, **CLOSE)


@given(seeds, sizes, ridges)
def test_the_normal_equations_hold_for_targets_that_differ_by_layer(seed, size, ridge):
    """(W' - W) B = (V - W C) A C' for any V: the gradient of the objective is zero."""
    keys, _, retained = draw(seed, *size)
    read, change = weighted_dual(keys, retained, ridge), random(seed + 7, len(keys.rows), 4)
    gram = ridge * torch.eye(size[0]).double() + keys.scaled.T @ keys.scaled
    if retained is not None:
        gram += retained.scaled.T @ retained.scaled
    torch.testing.assert_close(change.T @ read @ gram, (change * keys.weights[:, None]).T @ keys.rows, **CLOSE)


@given(seeds, st.integers(1, 3), st.integers(0, 3), st.sampled_from([1e-3, 1e-6, 1e-9]))
def test_as_the_ridge_vanishes_keys_meet_their_targets_and_retained_rows_stay(seed, k, n, ridge):
    """With independent rows F and wanted changes Y, what is missing is ridge (ridge + FF')^-1 Y, rows weighted."""
    keys, targets, retained = draw(seed, 12, k, n)
    shared = replacement(keys, targets, retained, ridge)
    factor = keys.scaled if retained is None else torch.cat([keys.scaled, retained.scaled])
    wanted = torch.linalg.matrix_norm((targets - keys.rows) * keys.weights.sqrt()[:, None])
    smallest = torch.linalg.eigvalsh(factor @ factor.T)[0]
    bound = ridge / (ridge + smallest) * wanted + 1e-12 * wanted / smallest  # and rounding
    missed = [(shared(keys.rows) - targets) * keys.weights.sqrt()[:, None]]
    if retained is not None:
        missed.append((shared(retained.rows) - retained.rows) * retained.weights.sqrt()[:, None])
    assert torch.linalg.matrix_norm(torch.cat(missed)) <= bound


@given(seeds, sizes, ridges)
def test_retained_rows_move_no_more_than_the_keys_had_to(seed, size, ridge):
    """The identity costs sum a |t - c|^2; the optimum costs no more, and each of its terms no more than that."""
    keys, targets, retained = draw(seed, *size)
    shared = replacement(keys, targets, retained, ridge)
    budget = (keys.weights[:, None] * (targets - keys.rows) ** 2).sum()
    spent = ridge * (shared.write @ shared.read).square().sum()
    if retained is not None:
        spent += (retained.weights[:, None] * (shared(retained.rows) - retained.rows) ** 2).sum()
    assert spent <= budget * (1 + 1e-10)


@given(seeds, sizes, ridges, st.integers(2, 4))
def test_equal_rows_are_merged_and_that_changes_nothing(seed, size, ridge, times):
    keys, targets, retained = draw(seed, *size)
    many = WeightedRows(keys.rows.repeat(times, 1), keys.weights.repeat(times))
    aims = torch.cat([targets + random(seed + number, *targets.shape) for number in range(times)])
    shared = replacement(many, aims, retained, ridge)
    assert shared.rank == min(len(keys.rows), size[0])
    unmerged = (aims - many.rows).T @ weighted_dual(many, retained, ridge)
    torch.testing.assert_close(shared.write @ shared.read, unmerged, **CLOSE)


@given(seeds, sizes, ridges)
def test_the_order_of_the_keys_does_not_matter(seed, size, ridge):
    keys, targets, retained = draw(seed, *size)
    order = torch.randperm(len(keys.rows), generator=torch.Generator().manual_seed(seed))
    shuffled = WeightedRows(keys.rows[order], keys.weights[order])
    first, second = replacement(keys, targets, retained, ridge), replacement(shuffled, targets[order], retained, ridge)
    assert torch.equal(first.write, second.write) and torch.equal(first.read, second.read)  # merging sorts


@given(seeds, st.integers(1, 6), st.integers(1, 12))
def test_capped_pairs_have_the_same_product_and_at_most_the_width_as_rank(seed, d, k):
    up, down = random(seed, 4, k), random(seed + 1, k, d)
    left, right = capped(up, down)
    torch.testing.assert_close(left @ right, up @ down, **CLOSE)
    assert len(right) == min(k, d)


@settings(max_examples=5)
@given(seeds)
def test_many_retained_rows_of_one_direction_are_still_solved(seed):
    """Condition 4e7, as a thousand prompts' almost equal end-of-text rows make it; float32 would keep no digit."""
    direction = 30 * random(seed, 1, 24)
    retained = WeightedRows.of(direction + 1e-3 * random(seed + 1, 1000, 24))
    keys, targets = WeightedRows.of(random(seed + 2, 2, 24)), random(seed + 3, 2, 24)
    shared = replacement(keys, targets, retained, 0.5)
    weight = random(seed + 4, 3, 24)
    best = np.linalg.lstsq(*stacked(weight, keys, targets, retained, 0.5), rcond=None)[0]
    np.testing.assert_allclose(
        shared.fold(weight)[0], best.T, rtol=0, atol=1e-7
    )  # 4e7 times 1e-16 is 4e-9, with a digit of room


def test_errors_say_what_is_wrong():
    keys, targets, retained = draw(0, 4, 2, 2)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        replacement(keys, targets, retained, 0.0)
    with pytest.raises(ValueError, match="2 keys need as many targets"):
        replacement(keys, targets[:1], retained, 1.0)
    with pytest.raises(ValueError, match="positive and finite"):
        WeightedRows(targets, torch.tensor([1.0, 0.0]).double())
    with pytest.raises(ValueError, match=r"Rows \(n, d\) and weights \(n,\) do not fit"):
        WeightedRows(targets, torch.ones(3).double())
    with pytest.raises(ValueError, match="NaN or infinite"):
        WeightedRows.of(targets / 0)


def test_second_moments_stand_in_for_any_number_of_rows():
    rows, keys, targets = random(0, 40, 6), random(1, 3, 6), random(2, 3, 6)
    weighted = WeightedRows.of(rows, 0.7)
    moments = WeightedRows.of_gram(rows.T @ rows, 0.7)
    assert len(moments.rows) == 6
    maps = [replacement(WeightedRows.of(keys), targets, kept, 0.5) for kept in (weighted, moments)]
    x = random(3, 4, 6)
    torch.testing.assert_close(maps[0](x), maps[1](x), rtol=0, atol=1e-9)


def test_moments_that_are_none_are_refused():
    with pytest.raises(ValueError, match="negative eigenvalue"):
        WeightedRows.of_gram(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    with pytest.raises(ValueError, match="second moments are zero"):
        WeightedRows.of_gram(torch.zeros(3, 3, dtype=torch.float64))
