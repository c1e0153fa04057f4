"""The token rows of phrases: what the closed-form erasers of image models work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from conceptx.geometry.arrays import to_working
from conceptx.models.base import ImageModel
from conceptx.models.encoded import Prompts

Tokens = Literal["last", "last+rest", "all"]
Phrase = tuple[str, str]  # a prompt and the name in it; ("", "") is the empty prompt
EMPTY: Phrase = ("", "")


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The token rows of phrases, each text encoded once and together, so that rows of equal beginnings are equal.

    length: how many rows belong to the tokens that are counted; SD 3 puts the rows of another tokenizer behind them.
    """

    model: ImageModel
    prompts: Prompts
    place: Mapping[str, int]
    length: int

    @staticmethod
    def of(model: ImageModel, phrases: Iterable[Phrase], *, trimmed: bool = False) -> TokenRows:
        """trimmed: only rows up to the end-of-text token will be asked for, so none behind it need be computed.

        Raises ValueError for a prompt that the tokenizer would cut.
        """
        texts = list(dict.fromkeys(text for text, _ in phrases))
        place = {text: number for number, text in enumerate(texts)}
        return TokenRows(model, model.encode(texts, trimmed=trimmed), place, model.context)

    def block(self, phrase: Phrase) -> Tensor:
        """All rows (length, d) that the model is given of a phrase, in the working dtype."""
        return to_working(self.prompts.states[self.place[phrase[0]]])

    def last(self, phrase: Phrase) -> int:
        """The place of the name's last token; of the end-of-text token for the empty prompt."""
        prompt, name = phrase
        return self.model.subject_end(prompt, name) if name else int(self.prompts.end[self.place[prompt]])

    def last_rows(self, phrases: Sequence[Phrase]) -> Tensor:
        """The row (n, d) of each name's last token, in the working dtype."""
        numbers = torch.tensor([self.place[prompt] for prompt, _ in phrases])
        return to_working(self.prompts.states[numbers, torch.tensor([self.last(phrase) for phrase in phrases])])

    def rows(self, phrase: Phrase, tokens: Tokens) -> Tensor:
        """The rows (n, d) of a phrase's name and what follows, as `tokens` says; "all": from the first token on."""
        last = self.last(phrase)
        first = int(self.prompts.first[self.place[phrase[0]]]) if tokens == "all" else last
        return self.block(phrase)[first : last + 1 if tokens == "last" else self.length]

    def aligned(self, phrases: Sequence[Phrase], tokens: Tokens) -> list[Tensor]:
        """The rows of several phrases, cut at the tail to the shortest."""
        blocks = [self.rows(phrase, tokens) for phrase in phrases]
        shortest = min(map(len, blocks))
        return [block[:shortest] for block in blocks]
