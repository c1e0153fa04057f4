import numpy as np
import pytest
import torch
from methods.data import labelled, majority
from sklearn.svm import LinearSVC

from conceptx.methods import INLP, RLACE


def accuracy(X, z):
    return LinearSVC(dual=False).fit(X - X.mean(0), z).score(X - X.mean(0), z)


def test_the_first_direction_is_the_classifier():
    X, z = labelled(500, 8, 2)
    weights = LinearSVC(dual=False, fit_intercept=False, random_state=0).fit(X - X.mean(0), z).coef_[0]
    direction = INLP(rounds=1).fit(X, z).basis[:, 0].numpy()
    assert abs(direction @ weights) / np.linalg.norm(weights) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("classes", "per_round"), [(2, 1), (4, 4)])
def test_each_round_takes_the_row_space_of_its_classifier(classes, per_round):
    X, z = labelled(500, 20, classes)
    one, three = (INLP(rounds=rounds).fit(X, z) for rounds in (1, 3))
    assert 1 <= one.rank <= per_round
    assert one.rank < three.rank <= 3 * per_round
    # later classifiers add to the span of the earlier ones, which stays in it to the span's tolerance of 1e-6
    assert float(one.angles(three).max()) < 1e-6
    P = torch.eye(20, dtype=torch.float64) - three.basis @ three.dual
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-12)


def test_more_rounds_leave_less_and_rlace_needs_one_direction():
    X, z = labelled(1500, 24, 2)
    one, five, twelve = (accuracy(INLP(rounds=rounds).fit(X, z).remove(X), z) for rounds in (1, 5, 12))
    assert accuracy(X, z) > one > five > twelve
    assert one > accuracy(RLACE().fit(X, z).remove(X), z) + 0.05
    assert accuracy(RLACE().fit(X, z).remove(X), z) < majority(z) + 0.02


def test_it_stops_when_the_space_is_full():
    X, z = labelled(200, 3, 2)
    assert INLP(rounds=50).fit(X, z).rank == 3


def test_settings_reach_the_classifier():
    X, z = labelled(400, 8, 2)
    z[:250] = 0
    default = INLP(rounds=1).fit(X, z)
    for other in (INLP(rounds=1, strength=1e-4), INLP(rounds=1, intercept=True), INLP(rounds=1, balanced=True)):
        assert float(default.angles(other.fit(X, z))[0]) > 1e-4


@pytest.mark.parametrize(
    ("eraser", "X", "z", "message"),
    [
        (INLP(rounds=0), np.eye(4), [0, 1, 0, 1], "at least one round"),
        (INLP(), np.eye(4), [0.5, 1, 0, 1], "continuous"),
        (INLP(), np.ones((4, 2)), [0, 1, 0, 1], "found no direction"),
    ],
)
def test_errors_say_what_is_wrong(eraser, X, z, message):
    with pytest.raises(ValueError, match=message):
        eraser.fit(X, z)
