"""R-LACE's published alternating loop (arXiv 2201.12091, section 3.3 and appendix C), written from its description.

Each round draws a batch and steps A by SGD against the loss, makes it symmetric, eigendecomposes and projects it onto
the Fantope (25 bisections for the water level); then it draws another batch and steps the classifier.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PublishedLoop:
    rank: int = 1
    batch: int = 128
    rate: float = 0.005  # of both players
    decay: float = 1e-4
    seed: int = 0

    def run(self, X: Tensor, z: Tensor, every: int) -> Iterator[tuple[int, float, Tensor]]:
        """(rounds, processor seconds of the loop alone, top eigenvectors) after each `every` rounds, without end.

        The time spent by the caller on each result is not counted.
        """
        torch.manual_seed(self.seed)
        d, classes = X.shape[1], int(z.max()) + 1
        removed = nn.Parameter(0.1 * torch.randn(d, d))
        classifier = nn.Linear(d, 1 if classes == 2 else classes)
        players = [
            torch.optim.SGD(p, lr=self.rate, weight_decay=self.decay) for p in ([removed], classifier.parameters())
        ]
        loss, done, seconds = _loss(classes), 0, 0.0
        while True:
            start = time.process_time()
            for _ in range(every):
                self._round(X, z, removed, classifier, players, loss)
            seconds, done = seconds + time.process_time() - start, done + every
            yield done, seconds, torch.linalg.eigh(removed.detach()).eigenvectors[:, -self.rank :]

    def _round(self, X: Tensor, z: Tensor, removed: Tensor, classifier: nn.Module, players: list, loss: Callable):
        for sign, player in zip((-1, 1), players, strict=True):
            rows = torch.randint(len(X), (self.batch,))
            x = X[rows]
            symmetric = (removed + removed.T) / 2
            if sign > 0:
                symmetric = symmetric.detach()
            player.zero_grad()
            (sign * loss(classifier(x - x @ symmetric), z[rows])).backward()
            player.step()
            if sign < 0:
                removed.data = _project((removed.data + removed.data.T) / 2, self.rank)


def _loss(classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    if classes > 2:
        return nn.functional.cross_entropy
    return lambda logits, z: nn.functional.binary_cross_entropy_with_logits(logits[:, 0], z.float())


def _project(matrix: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    low, high = values.min() - 1, values.max()
    for _ in range(25):
        middle = (low + high) / 2
        if (values - middle).clamp(0, 1).sum() > rank:
            low = middle
        else:
            high = middle
    return vectors @ ((values - middle).clamp(0, 1)[:, None] * vectors.T)
