import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import steer


@given(seeds, st.floats(-5, 5), st.floats(-5, 5))
def test_steering_is_the_sum_of_its_differences(seed, first, second):
    base, neutral, one, two = (random(seed + i, 3, 4) for i in range(4))
    expected = base + first * (one - neutral) + second * (two - neutral)
    torch.testing.assert_close(steer(base, neutral, [one, two], [first, second]), expected)


def test_a_weight_may_broadcast_and_no_concept_changes_nothing():
    base, neutral, one = (random(i, 3, 4) for i in range(3))
    weight = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(steer(base, neutral, [one], [weight]), base + weight * (one - neutral))
    assert torch.equal(steer(base, neutral, [], []), base)


def test_numbers_must_match():
    with pytest.raises(ValueError, match="as many weights"):
        steer(torch.ones(2), torch.ones(2), [torch.ones(2)], [])
