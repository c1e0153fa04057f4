import numpy as np
import pytest
import torch
from geometry.spaces import CLOSE, covariance, random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import DenseMetric, RetainMetric, dual


@given(seeds, st.integers(2, 12), st.integers(1, 15), st.floats(0.1, 10), st.floats(0.1, 10))
def test_woodbury_is_the_dense_solve(seed, d, n, ridge, weight):
    retain, columns = random(seed, d, n), random(seed + 1, d, 3)
    dense, woodbury, auto = (
        RetainMetric(ridge, retain, weight, form).solve(columns) for form in ("dense", "woodbury", "auto")
    )
    # condition number up to (0.1 + 10 * 60) / 0.1, so 1e-16 becomes 1e-12 and sums add one more digit
    torch.testing.assert_close(woodbury, dense, **CLOSE)
    torch.testing.assert_close(auto, dense, **CLOSE)


@given(seeds, st.integers(2, 12))
def test_dense_solve_against_numpy(seed, d):
    metric, columns = covariance(seed, d), random(seed + 1, d, 3)
    np.testing.assert_allclose(
        DenseMetric(metric).solve(columns), np.linalg.solve(metric, columns), rtol=1e-8, atol=1e-8
    )


@given(seeds, st.integers(3, 12), st.booleans())
def test_whitened_columns_have_the_metric_as_inner_product(seed, d, singular):
    factor = random(seed, d, d - 1 if singular else 2 * d)
    columns = factor @ random(seed + 1, factor.shape[1], 2)  # in the range
    metric = DenseMetric(factor @ factor.T)
    white = metric.whiten(columns)
    torch.testing.assert_close(white.T @ white, columns.T @ metric.solve(columns), rtol=1e-8, atol=1e-8)
    assert len(white) == d - singular


@given(seeds, st.integers(3, 12))
def test_a_singular_metric_is_inverted_on_its_range(seed, d):
    factor = random(seed, d, d - 1)
    metric, columns = factor @ factor.T, factor @ random(seed + 1, d - 1, 2)
    np.testing.assert_allclose(metric @ DenseMetric(metric).solve(columns), columns, rtol=1e-8, atol=1e-8)


def test_units_of_the_coordinates_do_not_matter():
    units = torch.logspace(-9, 9, 6, dtype=torch.float64)
    metric, columns = covariance(0, 6), random(1, 6, 2)
    scaled = DenseMetric(metric * torch.outer(units, units)).solve(columns * units[:, None])
    # without the scaled diagonal the small coordinates (1e-36 of the largest variance) would count as absent
    torch.testing.assert_close(scaled * units[:, None], DenseMetric(metric).solve(columns), rtol=1e-8, atol=1e-8)


@given(seeds, st.integers(2, 10))
def test_heavy_weights_give_the_exact_dual(seed, d):
    """(1/a + M)^-1 S - M^-1 S = -1/a (1/a + M)^-1 M^-1 S with M = K'G^-1 K: at most |M^-1| / a of the exact dual."""
    basis, metric, weight = random(seed, d, 2), DenseMetric(covariance(seed + 1, d)), 1e8
    exact = dual(basis, metric)
    gap = torch.linalg.matrix_norm(dual(basis, metric, torch.full((2,), weight, dtype=torch.float64)) - exact, 2)
    values = torch.linalg.eigvalsh(basis.T @ metric.solve(basis))
    rounding = 1e-13 * values[-1] / values[0]  # 1e-16 times the condition of M, with three digits of room
    assert gap <= (1 / (weight * values[0]) + rounding) * torch.linalg.matrix_norm(exact, 2)


def test_dependent_columns_are_refused_without_weights_and_allowed_with():
    basis, metric = torch.ones(4, 2, dtype=torch.float64), RetainMetric(1.0)
    with pytest.raises(ValueError, match="linearly dependent"):
        dual(basis, metric)
    assert dual(basis, metric, torch.ones(2, dtype=torch.float64)).shape == (2, 4)


@pytest.mark.parametrize("bad", [{"ridge": 0.0}, {"ridge": 1.0, "form": "qr"}])
def test_errors_say_what_is_wrong(bad):
    with pytest.raises(ValueError, match=r"positive|available"):
        RetainMetric(**bad)
