"""The four kinds of weight change: what they add, how they combine."""

import pytest
import torch

from conceptx.edit import Columns, Dense, LowRank, Rows
from conceptx.edit.deltas import as_low_rank, combine

SHAPE = (6, 5)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_of_each():
    return [
        Dense(normal(*SHAPE)),
        LowRank(normal(6, 2, seed=1), normal(2, 5, seed=2)),
        Rows(torch.tensor([4, 1]), normal(2, 5, seed=3)),
        Columns(torch.tensor([4, 0]), normal(6, 2, seed=4)),
    ]


def change(delta):
    return delta.added_to(torch.zeros(SHAPE, dtype=torch.float64))


def test_each_kind_adds_what_it_says():
    dense, pair, rows, columns = one_of_each()
    in_rows, in_columns = torch.zeros(2, *SHAPE, dtype=torch.float64)
    in_rows[4], in_rows[1] = rows.change[0], rows.change[1]
    in_columns[:, 4], in_columns[:, 0] = columns.change[:, 0], columns.change[:, 1]
    weight = normal(*SHAPE, seed=9)
    sums = (dense.change, pair.up @ pair.down, in_rows, in_columns)
    for delta, expected in zip(one_of_each(), sums, strict=True):
        assert torch.equal(delta.added_to(weight), weight + expected)


@pytest.mark.parametrize("delta", one_of_each(), ids=lambda d: d.kind)
def test_half_precision_weights_are_rounded_once(delta):
    weight = normal(*SHAPE, seed=9).bfloat16()
    exact = (weight.double() + change(delta)).bfloat16()
    # the sum is formed in float32: at most one unit of bfloat16 (2^-8 relative) where that lands on a rounding border
    torch.testing.assert_close(delta.added_to(weight), exact, rtol=2**-8, atol=0)
    assert delta.added_to(weight).dtype == torch.bfloat16


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
@pytest.mark.parametrize("delta", one_of_each(), ids=lambda d: d.kind)
def test_strength_multiplies_the_change(delta, strength):
    # powers of two (and zero) commute with rounding, so this is exact
    assert torch.equal(change(delta * strength), change(delta) * strength)


@pytest.mark.parametrize("second", range(4))
@pytest.mark.parametrize("first", range(4))
def test_combined_adds_both(first, second):
    one, two = one_of_each()[first], one_of_each()[second] * 0.5
    both = combine(one, two, SHAPE)
    # float64 throughout; sums of a few products of unit size differ in the last bits by the order of summation
    torch.testing.assert_close(change(both), change(one) + change(two), rtol=0, atol=1e-14)
    assert both.kind == (one.kind if first == second else "dense")


def test_combined_dense_changes_keep_float64():
    tiny = Dense(torch.full((2, 2), 1e-12, dtype=torch.float64))
    both = combine(Dense(torch.ones(2, 2, dtype=torch.float64)), tiny)
    assert torch.equal(both.change - 1, (1 + tiny.change) - 1) and bool((both.change > 1).all())


def test_rows_and_columns_are_a_low_rank_change_and_dense_is_not():
    dense, pair, rows, columns = one_of_each()
    assert torch.equal(change(as_low_rank(rows, SHAPE)), change(rows))
    assert torch.equal(change(as_low_rank(columns, SHAPE)), change(columns))
    assert as_low_rank(pair, SHAPE) is pair and as_low_rank(dense, SHAPE) is None


def test_no_rows_change_nothing():
    none = Rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, 5))
    weight = normal(*SHAPE)
    assert none.fits(SHAPE) and torch.equal(none.added_to(weight), weight)


@pytest.mark.parametrize("delta", one_of_each(), ids=lambda d: d.kind)
def test_fits_its_own_shape_only(delta):
    assert delta.fits(SHAPE)
    assert not any(delta.fits(shape) for shape in [(6, 4), (4, 5), (30,), (1, 6, 5)])
    with pytest.raises(ValueError, match="fit"):
        combine(delta, LowRank(normal(7, 1), normal(1, 8)), SHAPE)
