"""Can a freshly trained classifier still read the concept? Linear probes for the promise, others for what it leaves.

Every probe centres and scales its input by the mean and one number of the training rows, not column by column: a
column that erasing has made constant but for rounding would otherwise be blown up to full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy on `count` held-out rows, and the rate of their most common label."""

    accuracy: float
    majority: float
    count: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / self.count))

    @property
    def excess(self) -> float:
        """Accuracy above the majority rate."""
        return self.accuracy - self.majority


def linear_probe(
    train_x: Float[np.ndarray, "n d"],
    train_z: Shaped[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_z: Shaped[np.ndarray, " m"],
    *,
    seed: int = 0,
) -> ProbeScore:
    """Logistic regression (C = 1, with intercept) trained on the first pair and scored on the second."""
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(max_iter=1000, random_state=seed)
    return _score(classifier, train_x, train_z, test_x, test_z)


def rbf_probe(
    train_x: Float[np.ndarray, "n d"],
    train_z: Shaped[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_z: Shaped[np.ndarray, " m"],
    *,
    limit: int = 2000,
    seed: int = 0,
) -> ProbeScore:
    """Support vector machine with a Gaussian kernel (C = 10), trained on at most `limit` rows drawn at random."""
    from sklearn.svm import SVC

    kept = np.random.default_rng(seed).permutation(len(train_x))[:limit]
    return _score(SVC(C=10), train_x[kept], train_z[kept], test_x, test_z)


def mlp_probe(
    train_x: Float[np.ndarray, "n d"],
    train_z: Shaped[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_z: Shaped[np.ndarray, " m"],
    *,
    width: int = 128,
    seed: int = 0,
) -> ProbeScore:
    """One hidden layer of `width` ReLU units, at most 200 epochs of Adam."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed budget is the intention
        return _score(MLPClassifier((width,), random_state=seed), train_x, train_z, test_x, test_z)


def majority_rate(z: Shaped[np.ndarray, " n"]) -> float:
    """The share of the most common label."""
    return float(np.unique(z, return_counts=True)[1].max() / len(z))


def _score(classifier: Any, train_x: np.ndarray, train_z: Any, test_x: np.ndarray, test_z: Any) -> ProbeScore:
    train_z, test_z = np.asarray(train_z), np.asarray(test_z)
    _check(train_x, train_z, test_x, test_z)
    mean, scale = train_x.mean(0), _spread(train_x)
    predicted = classifier.fit((train_x - mean) / scale, train_z).predict((test_x - mean) / scale)
    return ProbeScore(float((predicted == test_z).mean()), majority_rate(test_z), len(test_z))


def _spread(x: np.ndarray) -> float:
    """Root mean square distance from the mean, a dimension (1 for constant rows)."""
    return float(np.sqrt(x.var(0).mean())) or 1.0


def _check(train_x: np.ndarray, train_z: np.ndarray, test_x: np.ndarray, test_z: np.ndarray) -> None:
    for name, x, z in (("training", train_x, train_z), ("test", test_x, test_z)):
        if x.ndim != 2 or len(x) != len(z) or not len(x):
            raise ValueError(f"The {name} rows must be (n, d) with n labels, got {x.shape} and {z.shape}.")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"Trained in dimension {train_x.shape[1]}, tested in {test_x.shape[1]}.")
    if len(np.unique(train_z)) < 2:
        raise ValueError("A probe needs at least two labels among the training rows.")
