"""Which tokens of a concept's texts name it, found by comparing them with its retained texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from conceptx.concept import Concept
from conceptx.models import LanguageModel

ODDS = 5.0  # how many times more often in a text on the concept than in another
COMMON = 0.05  # a token in more of the texts on the concept than this belongs to their form ("symbol", "capital")
TWICE = 2  # a token of one text only may be anything


@dataclass(frozen=True, eq=False)
class ConceptTokens:
    """ids: tokens that name what belongs to the concept (k,), in increasing order."""

    ids: Int[Tensor, " k"]

    def named(self, row: Sequence[int]) -> Bool[Tensor, " t"]:
        """Where in a row of tokens the concept is named."""
        return torch.isin(torch.tensor(row), self.ids)


def concept_tokens(model: LanguageModel, concept: Concept) -> ConceptTokens:
    """The tokens that name the concept: far more frequent in its texts than in the others, and each in few texts.

    Raises ValueError when there is none.
    """
    texts, others = (_texts_with(model.encode(corpus)) for corpus in (concept.texts, concept.retain_texts))
    n, m = len(concept.texts), len(concept.retain_texts)
    most = max(COMMON * n, TWICE)
    found = [
        token
        for token, count in texts.items()
        if TWICE <= count <= most and (count + 0.5) * (m + 1) >= ODDS * (others[token] + 0.5) * (n + 1)
    ]
    if not found:
        raise ValueError(
            f"No token tells the texts of {concept.name!r} from its retain_texts; give more texts, or the features."
        )
    return ConceptTokens(torch.tensor(sorted(found)))


def _texts_with(rows: Sequence[Sequence[int]]) -> Counter[int]:
    """In how many rows each token stands."""
    return Counter(token for row in rows for token in set(row))
