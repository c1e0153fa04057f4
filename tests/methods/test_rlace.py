import cvxpy as cp
import numpy as np
import pytest
import torch
from methods.data import entropy, labelled, majority
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from conceptx.geometry import Subspace
from conceptx.geometry.labels import one_hot
from conceptx.methods import RLACE, MeanDifference
from conceptx.methods.rlace import Game

STARTS = ["means", "random"]


def fresh(X, z):
    """(accuracy, log-loss) of a new, practically unpenalised classifier on its own training rows."""
    model = LogisticRegression(C=1e6, max_iter=2000).fit((X - X.mean(0)) / X.std(), z)
    p = model.predict_proba((X - X.mean(0)) / X.std())
    return float((p.argmax(1) == z).mean()), float(-np.log(p[np.arange(len(z)), z]).mean())


def game(X, z):
    return Game.of(torch.as_tensor(X - X.mean(0)), one_hot(torch.as_tensor(z), int(z.max()) + 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_random_start_finds_the_mean_difference(seed):
    X, z = labelled(1500, 32, 2)
    direction = RLACE(start="random", seed=seed).fit(X, z).basis[:, 0].numpy()
    gap = X[z == 1].mean(0) - X[z == 0].mean(0)
    # a loss within 1e-6 of the entropy leaves an angle of about 1e-3 or less, whose cosine is 1 - 1e-6
    assert abs(direction @ gap) / np.linalg.norm(gap) > 1 - 1e-5


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("classes", [2, 4])
def test_k_classes_are_hidden_by_k_minus_one_directions(classes, start):
    X, z = labelled(1500, 32, classes)
    space = RLACE(rank=classes - 1, start=start).fit(X, z)
    accuracy, loss = fresh(space.remove(X), z)
    assert fresh(X, z)[0] > majority(z) + 0.3
    assert accuracy < majority(z) + 0.01
    assert loss == pytest.approx(entropy(z), abs=1e-4)  # the fresh classifier is unpenalised, the game's nearly
    assert float(MeanDifference().fit(X, z).angles(space).max()) < 0.01


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [1, 2])
def test_fewer_directions_cannot_hide_the_classes(rank, start):
    X, z = labelled(400, 8, 4)
    space = RLACE(rank=rank, start=start).fit(X, z)
    accuracy, loss = fresh(space.remove(X), z)
    assert space.rank == rank
    assert accuracy > majority(z) + 0.05
    assert loss < entropy(z) - 0.05
    # and the game is played: the class means' leading directions alone leave the classifier more
    means = np.stack([X[z == c].mean(0) - X.mean(0) for c in range(4)])
    naive = Subspace.orthogonal(np.linalg.svd(means.T)[0][:, :rank], X.mean(0))
    assert loss > fresh(naive.remove(X), z)[1] - 1e-4


def test_the_best_direction_of_a_small_game_against_a_grid():
    X, z = labelled(300, 3, 3, seed=1)
    board = game(X, z)
    grid = torch.nn.functional.normalize(
        torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    best = max(board.answer(torch.outer(u, u), 1e-4).loss for u in grid)
    for start in STARTS:
        u = RLACE(start=start).fit(X, z).basis[:, 0]
        # 200 random directions lie within about 0.1 rad of any; the loss is flat to second order at the best
        assert board.answer(torch.outer(u, u), 1e-4).loss > best - 1e-3


@pytest.mark.parametrize("classes", [2, 3])
def test_the_relaxed_loss_and_its_gradient_against_cvxpy(classes):
    X, z = labelled(60, 4, classes)
    board, decay = game(X, z), 0.01
    half = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    removed = 0.1 * (half + half.T) + 0.4 * torch.eye(4, dtype=torch.float64)

    def referee(matrix):
        theta, intercept = cp.Variable((4, classes)), cp.Variable((1, classes))
        kept = (board.x - board.x @ matrix).numpy()
        logits = kept @ theta + np.ones((60, 1)) @ intercept
        chosen = cp.sum(cp.multiply(logits, board.targets.numpy()))
        loss = (cp.sum(cp.log_sum_exp(logits, axis=1)) - chosen) / 60 + decay / 2 * cp.sum_squares(theta)
        return cp.Problem(cp.Minimize(loss)).solve(cp.CLARABEL)

    answer = board.answer(removed, decay)
    assert answer.loss == pytest.approx(referee(removed), abs=1e-7)  # the interior point stops at 1e-8
    move = torch.zeros(4, 4, dtype=torch.float64)
    move[0, 1] = move[1, 0] = move[2, 2] = 1e-3
    slope = (referee(removed + move) - referee(removed - move)) / 2
    assert float((answer.gradient * move).sum()) == pytest.approx(slope, rel=1e-3)  # a central difference's error


def test_at_the_optimum_no_classifier_beats_the_constant_by_cvxpy():
    X, z = labelled(80, 5, 2)
    clean = RLACE(start="random").fit(X, z).remove(X)
    clean = (clean - clean.mean(0)) / clean.std()
    theta, intercept = cp.Variable(5), cp.Variable()
    margins = cp.multiply(2 * z - 1, clean @ theta + intercept)
    best = cp.Problem(cp.Minimize(cp.sum(cp.logistic(-margins)) / 80)).solve(cp.CLARABEL)
    assert best == pytest.approx(entropy(z), abs=1e-4)  # the game's tolerance is 1e-6 with a weight decay


@pytest.mark.parametrize(("rank", "start", "classes"), [(1, "means", 2), (4, "means", 3), (3, "random", 3)])
def test_what_is_left_is_a_projection_of_rank_d_minus_k(rank, start, classes):
    X, z = labelled(400, 9, classes)
    space = RLACE(rank=rank, start=start).fit(X, z)
    P = torch.eye(9, dtype=torch.float64) - space.basis @ space.dual
    torch.testing.assert_close(P, P.T, rtol=0, atol=1e-13)  # an orthonormal basis rounds at 1e-16
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-13)
    assert int((torch.linalg.eigvalsh(P) > 1e-6).sum()) == 9 - rank


def test_directions_beyond_the_needed_ones_change_x_least():
    X, z = labelled(400, 6, 2)
    X = np.concatenate([X, 1e-3 * np.random.default_rng(0).normal(size=(400, 2))], 1)
    one, three = (RLACE(rank=rank).fit(X, z) for rank in (1, 3))
    assert np.abs(one.remove(X) - three.remove(X)).max() < 1e-2


def test_an_rbf_machine_still_reads_the_synthetic_demo():
    """The authors' synthetic demo (spec 5.1), smaller: linear protection only."""
    random = np.random.default_rng(0)
    n, d = 2000, 12
    X, z = random.normal(size=(n, d)), random.integers(0, 2, n)
    noise = random.normal(size=(n, 6))
    for column, (sigma, slope) in enumerate(
        [(0.3, 0.3), (0.1, -0.7), (0.3, 0.5), (0.5, -0.7), (0.5, -0.8), (0.25, -0.2)]
    ):
        X[:, column] = (z + sigma * noise[:, column]) ** 2 + slope * z
    mixed = X @ (0.01 * random.normal(size=(d, d)))
    train, test = slice(0, 1200), slice(1200, n)
    space = RLACE().fit(mixed[train], z[train])
    before, after = (PCA(whiten=True, n_components=d - 1).fit_transform(X) for X in (mixed, space.remove(mixed)))
    linear = LogisticRegression(C=np.inf)
    assert linear.fit(before[train], z[train]).score(before[test], z[test]) > 0.9
    assert abs(linear.fit(after[train], z[train]).score(after[train], z[train]) - majority(z[train])) < 0.01
    assert SVC(C=10).fit(after[train], z[train]).score(after[test], z[test]) > 0.8


def test_least_squares_by_proposition_3_1():
    """Removing X'y leaves the residual ||y||^2; one step of INLP with least squares does not (Prop. 4.1)."""
    random = np.random.default_rng(0)
    X = random.normal(size=(300, 6)) @ random.normal(size=(6, 6))
    X -= X.mean(0)
    y = X @ random.normal(size=6) + 0.1 * random.normal(size=300)
    y -= y.mean()

    def residual(direction):
        left = Subspace.orthogonal(direction[:, None]).remove(X)
        return np.square(y - left @ np.linalg.lstsq(left, y, rcond=1e-10)[0]).sum()

    total = float(np.square(y).sum())
    assert residual(X.T @ y) == pytest.approx(total, rel=1e-12)
    assert residual(np.linalg.lstsq(X, y, rcond=None)[0]) < 0.9 * total
    by_method = MeanDifference().fit(X, y).basis[:, 0].numpy()  # the squared-loss game's optimum
    assert residual(by_method) == pytest.approx(total, rel=1e-12)


def test_the_same_seed_gives_the_same_subspace():
    X, z = labelled(300, 8, 3)
    first, again = (RLACE(start="random", seed=3).fit(X, z).basis for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("eraser", "z", "message"),
    [
        (RLACE(rank=5), [0, 1, 0, 1], "between 1 and the dimension 4"),
        (RLACE(rank=0), [0, 1, 0, 1], "between 1 and the dimension 4"),
        (RLACE(start="middle"), [0, 1, 0, 1], "available: means, random"),
        (RLACE(weight_decay=0.0), [0, 1, 0, 1], "weight_decay"),
        (RLACE(), [0.5, 1, 0, 1], "continuous"),
        (RLACE(), [1, 1, 1, 1], "one class only"),
    ],
)
def test_errors_say_what_is_wrong(eraser, z, message):
    with pytest.raises(ValueError, match=message):
        eraser.fit(np.eye(4), z)


def test_rayleigh_quotients_by_lemma_3_2():
    """The game on a'PAPa / |Pa|^2 is solved by removing A's top eigenvectors; K = 2 of d = 5, against random ones."""
    half = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(half @ half.T)

    def best_quotient(basis):
        return float(torch.linalg.eigvalsh((P := torch.eye(5).double() - basis @ basis.T) @ half @ half.T @ P)[-1])

    assert best_quotient(vectors[:, -2:]) == pytest.approx(float(values[2]), rel=1e-12)
    draws = torch.randn(200, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert min(best_quotient(torch.linalg.qr(draw).Q) for draw in draws) > float(values[2])
