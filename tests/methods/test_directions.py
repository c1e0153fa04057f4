import numpy as np
import pytest
import torch
from concept_erasure import LeaceEraser
from methods.data import labelled
from sklearn.decomposition import PCA

import conceptx.methods
from conceptx.geometry import Subspace
from conceptx.geometry.labels import encode_labels
from conceptx.methods import MeanDifference, PCADirections


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_mean_difference_makes_the_class_means_equal(classes):
    X, z = labelled(600, 12, classes)
    space = MeanDifference().fit(X, z)
    clean = space.remove(X)
    assert space.rank == classes - 1
    assert space.is_orthogonal
    means = np.stack([clean[z == c].mean(0) for c in range(classes)])
    np.testing.assert_allclose(means, np.broadcast_to(X.mean(0), means.shape), atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_mean_difference_is_the_authors_orth_mode(classes):
    X, z = labelled(400, 10, classes)
    x, columns = torch.as_tensor(X), encode_labels(z, 400)
    theirs = LeaceEraser.fit(x, columns, method="orth", constrain_cov_trace=False, svd_tol=1e-8, shrinkage=False)(x)
    torch.testing.assert_close(MeanDifference().fit(x, z).remove(x), theirs, rtol=0, atol=1e-10)


def test_pairs_against_scikit_learn():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(10, 6)) + 1, random.normal(size=(10, 6))
    mirrored = np.concatenate([a - b, b - a])  # centred by construction, the same components
    expected = Subspace.orthogonal(PCA(3).fit(mirrored).components_.T)
    # two eigensolvers of the same 6 x 6 problem; an angle is the error over the gap of the eigenvalues
    assert float(PCADirections(rank=3).fit_pairs(a, b).angles(expected).max()) < 1e-7


def test_labels_are_all_pairs_of_different_classes():
    X, z = labelled(40, 5, 3)
    first, second = np.nonzero(z[:, None] < z[None])
    pairs, labels = PCADirections(rank=2).fit_pairs(X[first], X[second]), PCADirections(rank=2).fit(X, z)
    assert float(pairs.angles(labels).max()) < 1e-7
    np.testing.assert_allclose(labels.mean, X.mean(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PCADirections(rank=5).fit(np.eye(4), [0, 1, 0, 1]), "dimension 4"),
        (lambda: PCADirections().fit(np.eye(4), [0.5, 1, 0, 1]), "continuous"),
        (lambda: PCADirections().fit_pairs(np.eye(4), np.eye(4)[:2]), "as many rows"),
        (lambda: PCADirections().fit_pairs(np.eye(4), np.eye(3)), "3 columns where 4"),
        (lambda: MeanDifference().fit(np.tile(np.eye(2), (2, 1)), [0, 0, 1, 1]), "nothing is to erase"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_methods_load_by_name_and_unknown_ones_are_named():
    for name in ("LEACE", "RLACE", "INLP", "MeanDifference", "PCADirections"):
        assert getattr(conceptx.methods, name).__name__ == name
    assert sorted(conceptx.methods.MODULES) == sorted(conceptx.methods.__all__) == sorted(dir(conceptx.methods))
    with pytest.raises(AttributeError, match="available: Budgeted, DirectionalAblation, EAR, ELM"):
        _ = conceptx.methods.LEECE
