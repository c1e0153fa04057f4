"""`Prompts`: encoded prompts, and where in their rows the words stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompts:
    """n encoded prompts: what an image model reads of them, and where in it their words stand.

    Rows of `states` are tokens: perhaps a begin token, then the content from `first` on, at `end` the end-of-text
    token, then padding. The subject of a name is its LAST content token, row `end - 1`. The empty prompt has no
    content: `first == end`. With several text encoders the rows count in the tokens that come first in `states`
    (SD 3: CLIP; FLUX: T5).

    texts:  the prompts.
    states: (n, length, d), what the site "text" carries.
    pooled: (n, p), what the site "pooled" carries; None where the architecture has none.
    first:  (n,) row of the first content token.
    end:    (n,) row of the end-of-text token.
    """

    texts: tuple[str, ...]
    states: Tensor
    pooled: Tensor | None
    first: Tensor
    end: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def subject(self) -> Tensor:
        """(n, d): the row of each prompt's last content token; for "" that of the end-of-text token."""
        rows = torch.where(self.end > self.first, self.end - 1, self.end)
        return self.states[torch.arange(len(self), device=self.states.device), rows.to(self.states.device)]

    def select(self, index: Sequence[int] | Tensor) -> Prompts:
        """These of the prompts, in this order; a number may come more than once."""
        places = torch.as_tensor(index, dtype=torch.long).cpu()
        here = places.to(self.states.device)
        return Prompts(
            tuple(self.texts[i] for i in places.tolist()),
            self.states[here],
            None if self.pooled is None else self.pooled[here],
            self.first[places.to(self.first.device)],
            self.end[places.to(self.end.device)],
        )

    def repeat(self, count: int) -> Prompts:
        """Every prompt `count` times, copies side by side."""
        return self.select([i for i in range(len(self)) for _ in range(count)])

    def __add__(self, other: Prompts) -> Prompts:
        """These prompts, then the others."""
        return Prompts(
            self.texts + other.texts,
            torch.cat([self.states, other.states]),
            None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled]),
            torch.cat([self.first, other.first]),
            torch.cat([self.end, other.end]),
        )
