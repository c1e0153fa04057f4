"""The activations that a dictionary is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conceptx.models import LanguageModel, Model
from conceptx.progress import track

BATCH = 16  # texts of similar length that the model reads at once


def recorded(model: Model, texts: Sequence[str], site: str) -> Tensor:
    """The activations (tokens, d) of the texts at a site, on the CPU in the model's dtype, shorter texts first.

    The first token that a language model reads attends to itself alone, and many keep huge activations there. Where the
    tokenizer puts no token of its own before a text, the first one of each text is therefore left out. Of a pipeline's
    text encoder every token is there that belongs to a prompt, also the begin token and the end-of-text token.
    Raises ValueError for an empty list or text, and for a text that is longer than the model can read.
    """
    lengths = lengths_of(model, texts, site)
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    states = torch.empty(sum(lengths), model.width(site), dtype=next(model.module.parameters()).dtype)
    filled, skipped = 0, _skipped(model)
    batches = -(-len(texts) // BATCH)
    found = model.record([texts[i] for i in order], [site], batch_size=BATCH)
    for number, batch in enumerate(track(found, "recording activations", batches)):
        ends = torch.tensor([lengths[i] + skipped for i in order[number * BATCH : (number + 1) * BATCH]]).cumsum(0)
        kept = torch.ones(int(ends[-1]), dtype=torch.bool)
        if skipped:
            kept[0] = False
            kept[ends[:-1]] = False
        rows = batch[site].cpu()[kept]
        states[filled : filled + len(rows)] = rows
        filled += len(rows)
    return states


def lengths_of(model: Model, texts: Sequence[str], site: str) -> list[int]:
    """How many activations `recorded` gives of each text, without running the model. Raises ValueError as it does."""
    if not isinstance(model, LanguageModel):
        return model.lengths(texts, site)
    lengths = [len(row) for row in model.encode(texts)]
    longest = max(lengths)
    if longest + len(model.start) > model.module.config.max_position_embeddings:
        most = model.module.config.max_position_embeddings - len(model.start)
        raise ValueError(
            f"Text {lengths.index(longest)} has {longest} tokens, the model reads at most {most}; split it."
        )
    return [length - _skipped(model) for length in lengths]


def _skipped(model: Model) -> int:
    return 1 if isinstance(model, LanguageModel) and not model.start else 0
