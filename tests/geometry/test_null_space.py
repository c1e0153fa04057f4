"""Directions without the rows, and directions that a matrix does not read, against whole decompositions."""

import pytest
import torch

from conceptx.geometry.arrays import gram
from conceptx.geometry.null_space import outside, principal_directions, quiet_directions

WIDTH = 24


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def fading(seed, count):
    """Rows whose principal values fall from 3 to 0.02."""
    return 3 * random(seed, count, WIDTH) * torch.logspace(0, -2.2, WIDTH).double()


@pytest.mark.parametrize("count", [1, 5, 24, 80])
@pytest.mark.parametrize("threshold", [1e-9, 3.0, 1e6])
def test_outside_is_the_projection_off_the_loud_eigenvectors(count, threshold):
    rows, x = fading(1, count), random(2, 6, WIDTH)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    loud = vectors[:, values >= threshold]
    torch.testing.assert_close(outside(rows, x, threshold), x - x @ loud @ loud.T, rtol=0, atol=1e-10)


def test_quiet_directions_are_the_last_singular_ones_of_a_tall_matrix():
    weight = random(1, 40, WIDTH)
    expected = torch.linalg.svd(weight).Vh[-2:]
    found = quiet_directions(weight, principal_directions(fading(2, 9), 2))
    torch.testing.assert_close(found.T @ found, expected.T @ expected, rtol=0, atol=1e-10)
    signs = found.gather(1, found.abs().argmax(1, keepdim=True))
    assert bool((signs > 0).all())


@pytest.mark.parametrize("deficient", [False, True])
def test_of_a_large_null_space_what_it_has_of_the_principal_directions(deficient):
    weight = random(1, 40, 5) @ random(2, 5, WIDTH) if deficient else random(1, 5, WIDTH)
    preferred = principal_directions(fading(2, 9), 2)
    found = quiet_directions(weight, preferred)
    assert (weight @ found.T).abs().max() < 1e-9
    null = torch.linalg.svd(weight).Vh[5:]
    expected = torch.linalg.qr((preferred @ null.T @ null).T).Q
    torch.testing.assert_close(found.T @ found, expected @ expected.T, rtol=0, atol=1e-9)


def test_principal_directions():
    rows = fading(2, 9)
    expected = torch.linalg.svd(rows).Vh[:2]
    found = principal_directions(rows, 2)
    torch.testing.assert_close(found.T @ found, expected.T @ expected, rtol=0, atol=1e-10)


def test_outside_in_one_dimension():
    x = torch.tensor([[2.0], [-3.0]]).double()
    assert torch.equal(outside(torch.ones(3, 1).double(), x, 3.0), 0 * x)
    assert torch.equal(outside(torch.ones(3, 1).double(), x, 3.1), x)


@pytest.mark.parametrize("shape", [(5, 9), (40, 9)])
def test_the_gram_matrix_is_symmetric_to_the_bit(shape):
    rows = random(1, *shape)
    for given in (rows, rows.T.contiguous().T):
        found = gram(given)
        assert torch.equal(found, found.T)
        torch.testing.assert_close(found, rows.T @ rows, rtol=0, atol=1e-12)
