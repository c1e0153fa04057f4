"""Labelled vectors with a linear trace of their class, in correlated coordinates."""

import numpy as np


def labelled(n: int, d: int, classes: int, *, seed: int = 0, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d) with class means `shift` apart in random directions, mixed by a random matrix; z (n,)."""
    random = np.random.default_rng(seed)
    z = random.integers(0, classes, n)
    means = shift * random.normal(size=(classes, d)) / np.sqrt(d)
    mixing = random.normal(size=(d, d)) / np.sqrt(d) + 0.3 * np.eye(d)
    return (random.normal(size=(n, d)) + 4 * means[z]) @ mixing + 2, z


def entropy(z: np.ndarray) -> float:
    shares = np.unique(z, return_counts=True)[1] / len(z)
    return float(-(shares * np.log(shares)).sum())


def majority(z: np.ndarray) -> float:
    return float(np.unique(z, return_counts=True)[1].max() / len(z))
