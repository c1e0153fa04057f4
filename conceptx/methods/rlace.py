"""R-LACE: the linear game between a classifier and a projection that erases `rank` directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from conceptx.eraser import VectorEraser
from conceptx.geometry import Array, Subspace, project_fantope
from conceptx.geometry.arrays import matrix
from conceptx.geometry.labels import class_indices, one_hot
from conceptx.methods._span import mean_directions


@dataclass(frozen=True)
class RLACE(VectorEraser):
    """Ravfogel et al. 2022, "Linear Adversarial Concept Erasure", arXiv 2201.12091, Eq. 2 and section 3.3.

    max over orthogonal projections P of rank d - K of min over theta of the log-loss of theta'P x, relaxed to
    x - A x with A in the Fantope {0 <= A <= I, tr A = K}; the top K eigenvectors of A are erased.

    Differs from the authors' code, which alternates tens of thousands of stochastic steps with one
    eigendecomposition each:
    - for each A the classifier is solved to convergence on all rows, the gradient in A follows by the envelope
      theorem, and a step of A is kept only if the loss rises;
    - the game is played under a weight decay that falls from the top eigenvalue of the covariance to
      `weight_decay`. With little decay every A with eigenvalues below 1 loses nothing, so the relaxed loss is flat
      inside the Fantope; with much it points to the differences of the class means;
    - inputs are scaled by one number, so the projection stays orthogonal in the space of X;
    - of the vertices met, the one with the highest log-loss is returned.

    The class means decide the game where K is large enough: no linear classifier beats a constant exactly when
    they coincide (arXiv 2306.03819, section 3). With start "means" and K >= k - 1 for k classes their span is
    returned, the exact optimum, and no game is played. start "random" always plays.

    rank:         K, how many directions are erased. Where start "means" needs fewer, it adds those in which x
                  varies least, since the game does not tell them apart.
    start:        "means" (the class-mean differences) or "random" (a random A).
    weight_decay: of the classifier on inputs scaled to variance 1 (the authors': 1e-4), between 0 and 1.
    rounds:       at most so many steps of A for each weight decay.
    tolerance:    how close to the label entropy, in nats, the log-loss counts as equal to it.
    seed:         of the random start.
    """

    rank: int = 1
    start: Literal["means", "random"] = "means"
    weight_decay: float = 1e-4
    rounds: int = 200
    tolerance: float = 1e-6
    seed: int = 0

    def fit(self, X: Array, z: Array) -> Subspace:
        """The orthogonal subspace of rank K that hides the classes z (n,) in X (n, d) from linear classifiers.

        Raises ValueError for continuous labels, one class only, equal class means, or a rank above d.
        """
        x = matrix(X, "X")
        self._check(x.shape[1])
        indices, classes = class_indices(z, len(x))
        targets = one_hot(indices, classes).to(x)
        needed = mean_directions(x, targets)
        centred = x - x.mean(0)
        if self.start == "means" and self.rank >= needed.shape[1]:
            basis = _fill(needed, centred, self.rank)
        else:
            game = Game.of(centred, targets)
            basis = self._play(game, self._first(game))
        return Subspace.orthogonal(basis, x.mean(0))

    def _check(self, d: int) -> None:
        if not 1 <= self.rank <= d:
            raise ValueError(f"The rank must lie between 1 and the dimension {d}, got {self.rank}.")
        if self.start not in ("means", "random"):
            raise ValueError(f"Unknown start {self.start!r}; available: means, random.")
        if not 0 < self.weight_decay < 1:
            raise ValueError(f"weight_decay must lie between 0 and 1, got {self.weight_decay}.")

    def _first(self, game: Game) -> Tensor:
        d = game.x.shape[1]
        if self.start == "means":  # the most of the differences of the means that K directions can hold
            basis = torch.linalg.svd(game.x.T @ game.targets, full_matrices=False).U[:, : self.rank]
            return basis @ basis.T
        noise = torch.randn(d, d, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return project_fantope(noise.to(game.x), self.rank)

    def _play(self, game: Game, removed: Tensor) -> Tensor:
        decays, step = _falling(float(torch.linalg.matrix_norm(game.covariance, 2)), self.weight_decay), 0.0
        best, highest = vertex(removed, self.rank), -math.inf
        for decay in decays:
            tolerance = self.tolerance * self.weight_decay / decay
            removed, step = game.ascend(removed, self.rank, decay, step, self.rounds, tolerance)
            basis = vertex(removed, self.rank)
            loss = game.answer(basis @ basis.T, self.weight_decay).loss
            if loss > highest:
                best, highest = basis, loss
            if game.entropy - loss < self.tolerance:
                break
            step *= decays[1] / decays[0]  # loss(A) bends more under less decay
        return best


@dataclass(frozen=True, eq=False)
class Answer:
    """The best classifier against one A: its loss, theta (d, k) over the intercepts (k), the gradient in A."""

    loss: float
    parameters: Float[Tensor, "d1 k"]
    gradient: Float[Tensor, "d d"]


@dataclass(frozen=True, eq=False)
class Game:
    """loss(A) = min over softmax classifiers of the log-loss on x - A x.

    x: centred rows (n, d).  targets: one-hot (n, k).  covariance: of x (d, d), used to precondition.
    """

    x: Float[Tensor, "n d"]
    targets: Float[Tensor, "n k"]
    covariance: Float[Tensor, "d d"]

    @staticmethod
    def of(centred: Float[Tensor, "n d"], targets: Float[Tensor, "n k"]) -> Game:
        """The game on centred rows of any scale; one number brings their variance to 1 on average."""
        x = centred / centred.square().mean().sqrt()
        return Game(x, targets, x.T @ x / len(x))

    @property
    def entropy(self) -> float:
        """The log-loss of the best constant, in nats; no A can make the loss higher."""
        return float(torch.special.entr(self.targets.mean(0)).sum())

    def answer(self, removed: Float[Tensor, "d d"], decay: float, warm: Tensor | None = None) -> Answer:
        """The softmax regression on x - A x with the weight decay, to convergence, from the parameters `warm`.

        L-BFGS runs on phi with theta = C^-1/2 phi, C about the curvature, so it takes few steps for any covariance.
        """
        d, k = self.x.shape[1], self.targets.shape[1]
        kept = torch.eye(d).to(removed) - removed  # I - A
        values, vectors = torch.linalg.eigh(kept @ self.covariance @ kept / k)
        roots = (values.clamp(min=0) + decay).sqrt()
        unscale, features = (vectors / roots) @ vectors.T, kept @ (vectors / roots) @ vectors.T

        def objective(phi: Tensor) -> tuple[Tensor, Tensor]:
            loss, slope, shift = self._slopes(features @ phi[:-1], phi[-1])
            theta = unscale @ phi[:-1]
            gradient = features.T @ slope + decay * unscale @ theta
            return loss + decay / 2 * theta.square().sum(), torch.cat([gradient, shift[None]])

        first = torch.zeros(d + 1, k).to(removed) if warm is None else warm
        first = torch.cat([(vectors * roots) @ (vectors.T @ first[:-1]), first[-1:]])
        loss, phi = _minimise(objective, first)
        theta = unscale @ phi[:-1]
        cross = self._slopes(features @ phi[:-1], phi[-1])[1] @ theta.T
        return Answer(loss, torch.cat([theta, phi[-1:]]), -(cross + cross.T) / 2)

    def ascend(
        self, removed: Tensor, rank: int, decay: float, step: float, rounds: int, tolerance: float
    ) -> tuple[Tensor, float]:
        """(A, step size) after projected ascent of loss(A): the step grows after a rise and shrinks after a fall.

        Ends when the loss is within `tolerance` of the entropy, a rise is below `tolerance` or 1e-5 of
        what is left, A no longer moves, or after `rounds` steps. A step of 0 asks for a first one of length 1.
        """
        here = self.answer(removed, decay)
        for _ in range(rounds):
            left = self.entropy - here.loss
            if left < tolerance:
                break
            step = step or 1 / float(torch.linalg.matrix_norm(here.gradient))
            tried = project_fantope(removed + step * here.gradient, rank)
            there = self.answer(tried, decay, here.parameters)
            moved, rise = float((tried - removed).abs().max()), there.loss - here.loss
            if rise > 0:
                removed, here, step = tried, there, 1.5 * step
            else:
                step /= 3
            if moved < 1e-6 or 0 < rise < max(tolerance, 1e-5 * left):
                break
        return removed, step

    def _slopes(self, weights: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean log-loss, x'(p - y) / n, mean p - y) of a classifier on x."""
        log_p = torch.log_softmax(self.x @ weights + intercepts, 1)
        residual = (log_p.exp() - self.targets) / len(self.x)
        return -(log_p * self.targets).sum() / len(self.x), self.x.T @ residual, residual.sum(0)


def vertex(removed: Float[Tensor, "d d"], rank: int) -> Float[Tensor, "d K"]:
    """The top eigenvectors of A: they span the nearest orthogonal projection of that rank."""
    return torch.linalg.eigh(removed).eigenvectors[:, -rank:]


def _minimise(objective: Callable[[Tensor], tuple[Tensor, Tensor]], first: Tensor) -> tuple[float, Tensor]:
    def flat(point: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(torch.from_numpy(point).to(first).reshape(first.shape))
        return float(value), gradient.flatten().double().cpu().numpy()

    options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(flat, first.flatten().double().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), torch.from_numpy(found.x).to(first).reshape(first.shape)


def _falling(top: float, bottom: float) -> list[float]:
    """From top to bottom by factors of ten at most."""
    return np.geomspace(top, bottom, 1 + math.ceil(math.log10(top / bottom))).tolist()


def _fill(needed: Tensor, centred: Tensor, rank: int) -> Tensor:
    """The needed directions and, up to the rank, those orthogonal to them in which x varies least."""
    missing = rank - needed.shape[1]
    if not missing:
        return needed
    full = torch.linalg.qr(needed, mode="complete").Q
    others = full[:, needed.shape[1] :]
    rest = centred @ others
    quiet = torch.linalg.eigh(rest.T @ rest).eigenvectors[:, :missing]
    return torch.cat([full[:, : needed.shape[1]], others @ quiet], 1)
