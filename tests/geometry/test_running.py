"""Rows that come and go: every state of a running solve is the solve with the rows that are in it, by `replacement`."""

import pytest
import torch
from geometry.spaces import CLOSE, random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import WeightedRows, replacement
from conceptx.geometry.running import RunningSolve

# d, keys and retained rows of each of two groups: below, at and above d, and updates of more rows than d
sizes = st.tuples(st.integers(2, 9), st.integers(1, 12), st.integers(1, 12))
ridges = st.floats(0.05, 5)


def group(seed, d, k, n):
    """Keys and targets, and retained rows, with unequal weights."""
    weights = 0.1 + random(seed + 3, k + n).abs()
    keys, retained = WeightedRows(random(seed, k, d), weights[:k]), WeightedRows(random(seed + 2, n, d), weights[k:])
    return keys, random(seed + 1, k, d), retained


def together(*many):
    return WeightedRows(torch.cat([rows.rows for rows in many]), torch.cat([rows.weights for rows in many]))


def matrix(found):
    return found.write @ found.read


def assert_solves(solve, keys, targets, retained, ridge):
    found, expected = solve.map(), replacement(keys, targets, retained, ridge)
    assert found.rank == min(len(targets), found.dim) >= expected.rank
    torch.testing.assert_close(matrix(found), matrix(expected), **CLOSE)


@given(seeds, sizes, ridges)
def test_added_rows_are_solved_as_if_all_had_been_there(seed, size, ridge):
    (first, aims, kept), (more, other, also) = group(seed, *size), group(seed + 9, *size)
    solve = RunningSolve.start(size[0], ridge).add(first, aims).retain(kept)
    assert_solves(solve, first, aims, kept, ridge)
    solve = solve.retain(also).add(more, other)
    assert_solves(solve, together(first, more), torch.cat([aims, other]), together(kept, also), ridge)


@given(seeds, sizes, ridges)
def test_what_is_taken_out_again_leaves_the_former(seed, size, ridge):
    (first, aims, kept), (more, other, also) = group(seed, *size), group(seed + 9, *size)
    former = RunningSolve.start(size[0], ridge).add(first, aims).retain(kept)
    both = former.add(more, other).retain(also)
    for back in (both.release(also).remove(more, other), both.remove(more, other).release(also)):
        assert_solves(back, first, aims, kept, ridge)
        torch.testing.assert_close(back.inverse, former.inverse, **CLOSE)
    swapped = both.remove(first, aims).release(kept)  # in the order in which they came
    assert_solves(swapped, more, other, also, ridge)


@given(seeds, sizes, ridges, st.permutations(range(4)))
def test_the_order_does_not_matter(seed, size, ridge, order):
    (first, aims, kept), (more, other, also) = group(seed, *size), group(seed + 9, *size)
    steps = [
        lambda solve: solve.add(first, aims),
        lambda solve: solve.retain(kept),
        lambda solve: solve.add(more, other),
        lambda solve: solve.retain(also),
    ]
    solve = RunningSolve.start(size[0], ridge)
    for number in order:
        solve = steps[number](solve)
    assert_solves(solve, together(first, more), torch.cat([aims, other]), together(kept, also), ridge)


@given(seeds, sizes, ridges)
def test_equal_rows_add_their_weights_and_average_their_targets(seed, size, ridge):
    keys, aims, kept = group(seed, *size)
    twice = RunningSolve.start(size[0], ridge).retain(kept).retain(kept).add(keys, aims).add(keys, -aims)
    heavy = WeightedRows(keys.rows, 2 * keys.weights)
    expected = replacement(heavy, torch.zeros_like(aims), WeightedRows(kept.rows, 2 * kept.weights), ridge)
    torch.testing.assert_close(matrix(twice.map()), matrix(expected), **CLOSE)


@given(seeds, sizes, ridges, st.floats(0.1, 0.9))
def test_less_weight_is_a_release_of_the_difference(seed, size, ridge, share):
    keys, aims, kept = group(seed, *size)
    solve = RunningSolve.start(size[0], ridge).add(keys, aims).retain(kept)
    lighter = solve.release(WeightedRows(kept.rows, share * kept.weights))
    assert_solves(lighter, keys, aims, WeightedRows(kept.rows, (1 - share) * kept.weights), ridge)


def test_without_keys_nothing_changes():
    empty = RunningSolve.start(4, 0.5)
    assert empty.map().rank == 0
    keys, aims, kept = group(0, 4, 3, 5)
    there_and_back = empty.retain(kept).add(keys, aims).remove(keys, aims)
    assert there_and_back.map().rank == 0 and there_and_back.retain(kept).map().rank == 0


def test_a_hundred_rows_of_a_text_encoders_sort_come_and_go():
    """Rows of norm 140 that share most of it, one after the other in, and 99 out again in the same order.

    Each step rounds by 1e-16 times what the row holds against the ridge, up to 2e4 / 0.5; 2e-10 was seen.
    """
    d, ridge = 48, 0.5
    keys = 20 + 20 * random(0, 100, d) / 7
    aims, kept = 20 + 20 * random(1, 100, d) / 7, WeightedRows.of(20 + 20 * random(2, 30, d) / 7, 0.1)
    start = RunningSolve.start(d, ridge).retain(kept)
    solve = start
    for key, aim in zip(keys.split(1), aims.split(1), strict=True):
        solve = solve.add(WeightedRows.of(key), aim)
    expected = replacement(WeightedRows.of(keys), aims, kept, ridge)
    torch.testing.assert_close(matrix(solve.map()), matrix(expected), rtol=0, atol=1e-9)
    for key, aim in zip(keys[:99].split(1), aims[:99].split(1), strict=True):
        solve = solve.remove(WeightedRows.of(key), aim)
    expected = replacement(WeightedRows.of(keys[99:]), aims[99:], kept, ridge)
    torch.testing.assert_close(matrix(solve.map()), matrix(expected), rtol=0, atol=1e-9)
    assert solve.map().rank == 1


def test_what_cannot_be_is_refused():
    keys, aims, kept = group(0, 4, 2, 3)
    solve = RunningSolve.start(4, 1.0).add(keys, aims)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        RunningSolve.start(4, 0.0)
    with pytest.raises(ValueError, match="not in the solve with such weights; without them it would be singular"):
        solve.release(WeightedRows(keys.rows, keys.weights + 100))
    with pytest.raises(ValueError, match="would be singular"):  # exactly the ridge in this direction
        RunningSolve.start(4, 1.0).release(WeightedRows.of(torch.eye(4).double()[:1]))
    with pytest.raises(ValueError, match="2 keys cannot be taken out of a solve that holds 0"):
        RunningSolve.start(4, 1.0).retain(keys).remove(keys, aims)
    with pytest.raises(ValueError, match="2 keys need as many targets"):
        solve.add(keys, aims[:1])
    with pytest.raises(ValueError, match="The solve has width 4, the rows have 3"):
        solve.retain(WeightedRows.of(kept.rows[:, :3]))
