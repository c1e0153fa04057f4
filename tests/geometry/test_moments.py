import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import Moments

FIELDS = ("mean_x", "mean_z", "scatter_xx", "scatter_xz", "scatter_zz")


def same(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    for name in FIELDS:
        # up to 200 rows offset by 100: sums of 1e4 * 200 carry 1e-16 * 2e6, centring cancels it by design
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-10)


@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 3))
def test_streamed_and_merged_moments_are_the_moments_of_the_whole(seed, sizes, d, k):
    x, z = 100 + random(seed, sum(sizes), d), random(seed + 1, sum(sizes), k)
    batches = list(zip(x.split(sizes), z.split(sizes), strict=True))
    whole = Moments.of(x, z)
    same(Moments.stream(batches), whole)
    same(Moments.stream(batches[::-1]), whole)
    middle = len(batches) // 2
    if middle:
        same(Moments.stream(batches[:middle]) + Moments.stream(batches[middle:]), whole)


def test_covariances_against_torch():
    x, z = random(0, 50, 4), random(1, 50, 2)
    moments, joint = Moments.of(x, z), torch.cov(torch.cat([x, z], 1).T)
    torch.testing.assert_close(moments.covariance, joint[:4, :4])
    torch.testing.assert_close(moments.cross_covariance, joint[:4, 4:])


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="same positive number of rows"):
        Moments.of(torch.ones(0, 2), torch.ones(0, 1))
    with pytest.raises(ValueError, match="No batch"):
        Moments.stream([])
    with pytest.raises(ValueError, match="different dimensions"):
        Moments.of(torch.ones(3, 2), torch.ones(3, 1)) + Moments.of(torch.ones(3, 3), torch.ones(3, 1))
