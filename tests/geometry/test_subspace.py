import numpy as np
import pytest
import torch
from geometry.spaces import make, random, rounding, seeds, subspaces
from hypothesis import example, given
from scipy.linalg import subspace_angles

from conceptx.geometry import Subspace

ILL = make(9649, 10, 10, oblique=True)  # a square basis of condition 2.5e4


@given(subspaces(proper=False))
@example(ILL)
def test_dual_is_a_dual(space):
    torch.testing.assert_close(space.dual @ space.basis, torch.eye(space.rank, dtype=torch.float64), **rounding(space))


@given(subspaces(proper=False), seeds)
@example(ILL, 9656)
def test_removal_is_idempotent_and_keeps_the_mean(space, seed):
    x = random(seed, 7, space.dim)
    once, close = space.remove(x), rounding(space)
    torch.testing.assert_close(space.remove(once), once, **close)
    assert torch.equal(space.remove(space.mean), space.mean)
    assert float(space.coordinates(once).norm()) <= close["atol"] * max(1, float(space.dual.norm()))  # L amplifies x


@given(subspaces(), seeds)
def test_keep_and_remove_add_up_and_swap_in_the_complement(space, seed):
    x, rest, close = random(seed, 5, space.dim), space.complement(), rounding(space)
    torch.testing.assert_close(space.keep(x) + space.remove(x) - space.mean, x, **close)
    torch.testing.assert_close(rest.keep(x), space.remove(x), **close)
    torch.testing.assert_close(rest.remove(x), space.keep(x), **close)
    assert rest.rank == space.dim - space.rank


@given(subspaces(proper=False), seeds)
def test_replace_writes_the_other_basis(space, seed):
    other = make(seed, space.dim, space.rank, oblique=False)
    x = random(seed + 3, 4, space.dim)
    expected = space.remove(x) + space.coordinates(x) @ other.basis.T
    torch.testing.assert_close(space.replace(other)(x), expected, **rounding(space))


@given(subspaces(proper=False), seeds)
def test_angles_agree_with_scipy(space, seed):
    other = make(seed, space.dim, 1 + seed % space.dim, oblique=True)
    ours = space.angles(other).numpy()
    # where spans meet (ranks above d in sum) SciPy's angle of zero is the root of epsilon, 3e-8; ours is 1e-16
    np.testing.assert_allclose(ours, np.sort(subspace_angles(space.basis, other.basis)), atol=1e-7)


def test_small_angles_keep_their_digits():
    e = torch.eye(3, dtype=torch.float64)
    tilted = Subspace.orthogonal(e[:, :1] + 1e-9 * e[:, 1:2])
    # arccos alone would give 0: cos(1e-9) rounds to 1
    assert float(Subspace.orthogonal(e[:, :1]).angles(tilted)[0]) == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_that_goes_in_comes_out(dtype):
    space = make(0, 6, 2, oblique=True)
    x = random(1, 3, 6)
    out = space.remove(x.to(dtype))
    assert out.dtype == dtype
    # one rounding of the input and one of the output, each half a unit in the last place of numbers up to about 8
    torch.testing.assert_close(out.double(), space.remove(x), atol=32 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_stays_numpy(dtype):
    out = make(0, 6, 2, oblique=True).remove(random(1, 3, 6).numpy().astype(dtype))
    assert isinstance(out, np.ndarray)
    assert out.dtype == dtype


def test_orthogonal_is_told_from_oblique():
    assert make(0, 6, 2, oblique=False).is_orthogonal
    assert not make(0, 6, 2, oblique=True).is_orthogonal


def test_linear_passes_through_the_origin():
    zero = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(make(0, 6, 2, oblique=True).linear().remove(zero), zero)


def test_save_and_load(tmp_path):
    space = make(0, 6, 2, oblique=True)
    space.save(tmp_path / "a.safetensors")
    loaded = Subspace.load(tmp_path / "a.safetensors")
    assert all(torch.equal(getattr(space, name), getattr(loaded, name)) for name in ("basis", "dual", "mean"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Subspace.orthogonal(torch.ones(4, 2)), "linearly dependent"),
        (lambda: Subspace.orthogonal(torch.ones(2, 3)), "1 <= k <= d"),
        (lambda: Subspace.orthogonal(torch.tensor([[torch.nan], [1.0]])), "NaN"),
        (lambda: Subspace.orthogonal(torch.eye(3)[:, :1], torch.tensor([0.0, 0.0, torch.inf])), "infinite"),
        (lambda: make(0, 4, 1, True).remove(torch.ones(2, 3)), "dimension 4"),
        (lambda: make(0, 4, 1, True).replace(make(0, 4, 2, True)), "rank 1"),
        (lambda: make(0, 4, 1, True).angles(make(0, 5, 1, True)), "different dimensions"),
        (lambda: make(0, 2, 2, True).complement(), "no complement"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
