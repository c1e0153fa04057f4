import pytest
import torch
from geometry.spaces import CLOSE, make, random, seeds, subspaces
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import ConceptMap, RetainMetric, dual


@given(subspaces(proper=False), seeds, st.booleans())
def test_a_folded_layer_is_the_map_before_the_layer(space, seed, with_bias):
    weight, x = random(seed, 5, space.dim), random(seed + 2, 6, space.dim)
    bias = random(seed + 1, 5) if with_bias else None
    mapping = 0.7 * space.removal()
    folded, shift = mapping.fold(weight, bias)
    expected = mapping(x) @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(x @ folded.T + shift, expected, **CLOSE)


@given(seeds, st.integers(2, 16), st.integers(1, 3), st.integers(0, 4))
def test_uce_of_each_layer_is_one_shared_map(seed, d, erased, kept):
    """The published closed form (arXiv 2308.14761, Eq. 7, with the code's ridge) is W T, T = I + (C* - C) L."""
    erase, anchor = random(seed, d, min(erased, d)), random(seed + 1, d, min(erased, d))  # C, C*
    retain, weight = random(seed + 2, d, kept), random(seed + 3, 5, d)
    ridge, erase_scale, retain_scale = 0.5, 1.3, 0.7  # lambda, alpha, beta
    left = ridge * weight + erase_scale * weight @ anchor @ erase.T + retain_scale * weight @ retain @ retain.T
    right = ridge * torch.eye(d, dtype=torch.float64)
    right += erase_scale * erase @ erase.T + retain_scale * retain @ retain.T
    published = left @ torch.linalg.inv(right)
    weights = torch.full((erase.shape[1],), erase_scale, dtype=torch.float64)
    read = dual(erase, RetainMetric(ridge, retain if kept else None, retain_scale), weights)
    shared = ConceptMap(anchor - erase, read, torch.zeros(d, dtype=torch.float64))
    # the ridge 0.5 bounds the condition number by about (0.5 + ||C||^2) / 0.5 < 1e3
    torch.testing.assert_close(shared.fold(weight)[0], published, **CLOSE)


@given(subspaces(proper=False), seeds)
def test_strength_scales_the_change(space, seed):
    x, mapping = random(seed, 3, space.dim), space.removal()
    torch.testing.assert_close((0.3 * mapping)(x) - x, 0.3 * (mapping(x) - x), **CLOSE)


def test_a_relu_gate_acts_on_positive_coordinates_only():
    e = torch.eye(3, dtype=torch.float64)
    gated = ConceptMap(-e[:, :1], e[:1], 0 * e[0], gate="relu")
    x = torch.tensor([[2.0, 1.0, 1.0], [-2.0, 1.0, 1.0]], dtype=torch.float64)
    assert gated(x).tolist() == [[0.0, 1.0, 1.0], [-2.0, 1.0, 1.0]]
    assert not gated.affine
    with pytest.raises(ValueError, match="not affine"):
        gated.fold(e)


def test_gradients_pass_through_a_map():
    x = random(0, 2, 4).requires_grad_()
    make(1, 4, 2, oblique=True).removal()(x).sum().backward()
    assert x.grad is not None


def test_orthogonal_directions_commute_and_tilted_ones_do_not():
    e = torch.eye(4, dtype=torch.float64)
    first, second = (ConceptMap(-e[:, [i]], e[[i]], e[0] * 0) for i in (0, 1))
    tilted = ConceptMap(-(e[:, [0]] + e[:, [1]]) / 2, e[[0]] + e[[1]], e[0] * 0)
    assert first.commutes_with(second)
    assert not first.commutes_with(tilted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ConceptMap(m.write, m.read, m.mean, gate="softmax"), "available"),
        (lambda m: ConceptMap(m.write, m.read * torch.nan, m.mean), "read has 4 NaN"),
        (lambda m: m(torch.ones(2, 3)), "dimension 4"),
        (lambda m: m.fold(torch.ones(2, 3)), "reads dimension 3"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(0, 4, 1, oblique=True).removal())


def pair(seed, d, rank):
    return ConceptMap(random(seed, d, rank), random(seed + 1, rank, d), torch.zeros(d, dtype=torch.float64))


@given(seeds, st.integers(2, 10), st.integers(1, 14), st.integers(1, 14))
def test_two_maps_one_after_the_other_are_one(seed, d, first, second):
    one, two, x = pair(seed, d, first), pair(seed + 2, d, second), random(seed + 4, 5, d)
    both = one.then(two)
    assert both.rank <= min(d, first + second) or both.rank == first + second <= d
    torch.testing.assert_close(both(x), two(one(x)), rtol=1e-9, atol=1e-8)


def test_maps_with_a_gate_a_mean_or_another_dimension_do_not_compose():
    one, zero = pair(0, 4, 2), torch.zeros(4, dtype=torch.float64)
    for other in (ConceptMap(one.write, one.read, zero, "relu"), ConceptMap(one.write, one.read, zero + 1)):
        with pytest.raises(ValueError, match="identity for a gate and a mean of zero compose"):
            one.then(other)
    with pytest.raises(ValueError, match="dimensions 4 and 5"):
        one.then(pair(0, 5, 2))


@given(seeds, st.integers(2, 10), st.integers(1, 14))
def test_a_compact_map_is_the_same_through_no_more_coordinates_than_it_needs(seed, d, rank):
    mapping, x = pair(seed, d, rank), random(seed + 2, 5, d)
    doubled = ConceptMap(torch.cat([mapping.write] * 2, 1), torch.cat([mapping.read] * 2), mapping.mean)
    small = doubled.compact(1e-7)
    assert small.rank <= min(rank, d) and small.write.dtype == torch.float32
    size = float((mapping.write.norm() * mapping.read.norm() * x.norm()) + 1)
    assert (small(x) - doubled(x)).abs().max() < 1e-6 * size  # float32 factors, and what the tolerance leaves out


def test_a_gate_keeps_the_coordinates_it_looks_at():
    one = pair(0, 4, 2)
    gated = ConceptMap(torch.cat([one.write] * 2, 1), torch.cat([one.read] * 2), one.mean, "relu")
    assert gated.compact().rank == 4
