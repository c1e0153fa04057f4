"""Probes on data whose best accuracy is known."""

import numpy as np
import pytest

from conceptx.evaluation.probes import linear_probe, majority_rate, mlp_probe, rbf_probe

PROBES = [linear_probe, rbf_probe, mlp_probe]


def shifted(count, gap, seed, d=5):
    """Two Gaussians whose means differ by `gap` along the first axis: the best accuracy is Phi(gap / 2)."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 2, count)
    return rng.normal(size=(count, d)) + gap * (z[:, None] - 0.5) * np.eye(d)[0], z


def ring(count, seed):
    """A disc inside a ring: no line separates them, a circle does."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 2, count)
    angle, radius = rng.uniform(0, 2 * np.pi, count), 1 + 2 * z + rng.uniform(-0.5, 0.5, count)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle)]), z


@pytest.mark.parametrize("probe", PROBES)
def test_separated_classes_are_read_and_noise_is_not(probe):
    clear = probe(*shifted(600, 20, 0), *shifted(500, 20, 1))
    assert (clear.accuracy, clear.count, clear.standard_error) == (1, 500, 0)
    noise = probe(*shifted(600, 0, 2), *shifted(500, 0, 3))
    assert abs(noise.excess) < 5 * noise.standard_error


def test_linear_probe_reaches_the_bayes_rate():
    score = linear_probe(*shifted(5000, 2, 0), *shifted(5000, 2, 1))
    assert score.accuracy == pytest.approx(0.8413, abs=4 * score.standard_error)  # Phi(1)


def test_only_the_nonlinear_probes_read_a_ring():
    train, test = ring(600, 0), ring(500, 1)
    assert linear_probe(*train, *test).accuracy < 0.7
    assert rbf_probe(*train, *test).accuracy > 0.98
    assert mlp_probe(*train, *test).accuracy > 0.98


def test_scale_shift_and_rotation_of_the_input_change_nothing():
    (x, z), (y, w) = shifted(500, 1, 0), shifted(500, 1, 1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))
    plain = linear_probe(x, z, y, w)
    moved = linear_probe(1e-3 * x @ turn + 7, z, 1e-3 * y @ turn + 7, w)
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=1 / 500)  # a row on the border may change sides


def test_rounding_left_in_an_erased_column_is_not_blown_up():
    (x, z), (y, w) = shifted(500, 20, 0), shifted(500, 20, 1)
    x[:, 0], y[:, 0] = 1e-17 * z, 1e-17 * w
    assert linear_probe(x, z, y, w).accuracy < 0.6


def test_three_classes_and_text_labels():
    rng = np.random.default_rng(0)
    z = rng.integers(0, 3, 300)
    x = 10 * np.eye(3)[z] + rng.normal(size=(300, 3))
    names = np.array(["a", "b", "c"])[z]
    assert linear_probe(x[:200], names[:200], x[200:], names[200:]).accuracy == 1


def test_the_rbf_probe_trains_on_at_most_so_many_rows():
    x, z = shifted(400, 20, 0)
    z[:] = np.arange(400) % 2
    with pytest.raises(ValueError):  # one row holds one class only
        rbf_probe(x, z, x, z, limit=1)


def test_majority_rate():
    assert majority_rate(np.array([0, 1, 1, 1])) == 0.75
    assert linear_probe(*shifted(50, 5, 0), np.zeros((4, 5)), np.array([0, 1, 1, 1])).majority == 0.75


def test_wrong_shapes_are_refused():
    x, z = shifted(20, 1, 0)
    with pytest.raises(ValueError, match="training rows"):
        linear_probe(x, z[:10], x, z)
    with pytest.raises(ValueError, match="dimension 5, tested in 4"):
        linear_probe(x, z, x[:, :4], z)
    with pytest.raises(ValueError, match="two labels"):
        linear_probe(x, np.zeros(20), x, z)
