"""Distributions to learn from, kept as their largest entries plus the mass of the rest, and the loss against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALL = 1e-6  # keeps log(1 - s) finite in float32


@dataclass(frozen=True, eq=False)
class Targets:
    """Token rows with a next-token distribution to learn at some of their positions, all padded on the right.

    ids, length: the tokens (n, t) and how many of each row are real (n,).
    indices, probabilities: the k largest entries of each distribution (n, t, k).
    rest: the probability of all other tokens together (n, t).
    learn: whether a position counts (n, t).
    """

    ids: Int[Tensor, "n t"]
    length: Int[Tensor, " n"]
    indices: Int[Tensor, "n t k"]
    probabilities: Float[Tensor, "n t k"]
    rest: Float[Tensor, "n t"]
    learn: Float[Tensor, "n t"]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: Sequence[int] | Tensor) -> Targets:
        """The chosen rows, without columns that are padding in all of them."""
        part = Targets(*(getattr(self, f.name)[torch.as_tensor(chosen)] for f in fields(self)))
        longest = int(part.length.max())
        return Targets(
            part.ids[:, :longest],
            part.length,
            *(getattr(part, name)[:, :longest] for name in ("indices", "probabilities", "rest", "learn")),
        )

    def to(self, device: torch.device) -> Targets:
        return Targets(*(getattr(self, f.name).to(device) for f in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def mask(self) -> Tensor:
        """1 where there is a real token."""
        return (torch.arange(self.ids.shape[1], device=self.ids.device) < self.length[:, None]).long()

    @staticmethod
    def empty(rows: Sequence[Sequence[int]], kept: int, learn_from: Sequence[int] | None = None) -> Targets:
        """Rows with distributions still to be filled in; the first `learn_from` positions of a row do not count."""
        n, t = len(rows), max(map(len, rows))
        ids, learn = torch.zeros(n, t, dtype=torch.long), torch.zeros(n, t)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            learn[number, (learn_from[number] if learn_from else 0) : len(row)] = 1
        length = torch.tensor([len(row) for row in rows])
        return Targets(
            ids, length, torch.zeros(n, t, kept, dtype=torch.long), torch.zeros(n, t, kept), torch.zeros(n, t), learn
        )


def cross_entropy(logits: Float[Tensor, "n t v"], targets: Targets) -> Float[Tensor, " n"]:
    """Cross-entropy of each row against its targets, the mean over its positions that count.

    The mass outside the kept entries is compared as a whole, so the gradient vanishes where the student gives every
    kept token and the rest together what the target gives.
    """
    wanted = targets.learn.bool()
    log_p = logits[wanted].float().log_softmax(-1)
    kept = log_p.gather(-1, targets.indices[wanted])
    losses = -(targets.probabilities[wanted] * kept).sum(-1)
    rest = targets.rest[wanted]
    if bool((rest > 0).any()):
        outside = (1 - kept.exp().sum(-1)).clamp(min=SMALL)
        losses = losses - rest * outside.log()
    row = torch.arange(len(targets), device=logits.device)[:, None].expand_as(wanted)[wanted]
    totals = torch.zeros(len(targets), device=logits.device).index_add(0, row, losses)
    return totals / targets.learn.sum(1).clamp(min=1)
