import torch
from concept_erasure import optimal_linear_shrinkage
from geometry.spaces import covariance, random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import shrink, whitening


@given(seeds, st.integers(2, 10), st.booleans())
def test_whitening_whitens_and_undoes_itself(seed, d, singular):
    factor = random(seed, d, d - 1 if singular else 3 * d)
    matrix = factor @ factor.T
    white, back = whitening(matrix)
    projector = white @ matrix @ white
    # condition numbers of random 10 x 9 factors reach 1e6, so 1e-16 becomes 1e-10; two digits of room
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(projector @ projector, projector, **close)
    torch.testing.assert_close(white @ back, projector, **close)
    torch.testing.assert_close(back @ back, matrix, rtol=1e-8, atol=1e-8 * float(matrix.abs().max()))
    assert round(float(torch.trace(projector))) == d - singular


@given(seeds, st.integers(2, 20), st.integers(3, 40))
def test_shrinkage_stays_positive_semi_definite_and_keeps_the_trace(seed, d, n):
    sample = torch.cov(random(seed, n, d).T)
    shrunk = shrink(sample, n)
    # eigenvalues are of order d / n; rounding is 1e-16 of the largest
    assert torch.linalg.eigvalsh(shrunk)[0] > -1e-12
    torch.testing.assert_close(torch.trace(shrunk), torch.trace(sample))


def test_shrinkage_against_the_authors_package():
    x = random(0, 60, 12) @ torch.diag(torch.arange(1.0, 13, dtype=torch.float64))
    sample, n = torch.cov(x.T), 60
    theirs = optimal_linear_shrinkage(sample * (n - 1) / n, n) * n / (n - 1)  # they divide by n
    torch.testing.assert_close(shrink(sample, n), theirs, rtol=1e-10, atol=1e-10)  # the same formula in float64


def test_an_isotropic_covariance_is_left_alone():
    identity = 3 * torch.eye(5, dtype=torch.float64)
    assert torch.equal(shrink(identity, 10), identity)


def test_many_rows_need_no_shrinkage():
    matrix = covariance(0, 4)
    torch.testing.assert_close(shrink(matrix, 10**9), matrix, rtol=1e-6, atol=1e-6)  # the weight is 1 - O(1 / n)
