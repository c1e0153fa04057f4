import cvxpy as cp
import numpy as np
import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptx.geometry import project_fantope, waterfill


def symmetric(seed: int, d: int) -> torch.Tensor:
    square = random(seed, d, d)
    return (square + square.T) / 2


@given(seeds, st.integers(1, 20), st.data())
def test_the_projection_lies_in_the_fantope_and_is_idempotent(seed, d, data):
    rank = data.draw(st.integers(1, d))
    point = project_fantope(3 * symmetric(seed, d), rank)
    values = torch.linalg.eigvalsh(point)
    # the water level is exact, so only the eigendecomposition of a 20 x 20 matrix rounds (1e-14)
    assert values[0] > -1e-12
    assert values[-1] < 1 + 1e-12
    assert float(torch.trace(point)) == pytest.approx(rank, abs=1e-11)
    torch.testing.assert_close(project_fantope(point, rank), point, rtol=0, atol=1e-11)


@settings(max_examples=8)
@given(seeds, st.integers(2, 20), st.data())
def test_the_projection_against_cvxpy(seed, d, data):
    rank, matrix = data.draw(st.integers(1, d - 1)), symmetric(seed, d)
    variable = cp.Variable((d, d), symmetric=True)
    constraints = [variable >> 0, np.eye(d) - variable >> 0, cp.trace(variable) == rank]
    cp.Problem(cp.Minimize(cp.sum_squares(variable - matrix.numpy())), constraints).solve(cp.CLARABEL)
    # an interior-point solver stops at a gap of 1e-8 in the squared distance: its root in the variable
    np.testing.assert_allclose(project_fantope(matrix, rank), variable.value, atol=2e-4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.data())
def test_waterfill_has_the_sum_asked_for(values, data):
    total = data.draw(st.integers(1, len(values)))
    filled = waterfill(torch.tensor(values, dtype=torch.float64), total)
    assert float(filled.sum()) == pytest.approx(total, abs=1e-9)  # values up to 1e3 carry 1e-13 each


def test_equal_eigenvalues_share():
    torch.testing.assert_close(waterfill(torch.zeros(4, dtype=torch.float64), 2), torch.full((4,), 0.5).double())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_outside_the_dimension_is_refused(rank):
    with pytest.raises(ValueError, match="between 1 and the dimension 3"):
        project_fantope(torch.eye(3), rank)
