"""What a corpus of texts weighs in a closed form: the second moments of its token rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import to_working, working_dtype
from conceptx.models.diffusion import ENCODED_AT_ONCE, DiffusionModel
from conceptx.progress import track


def second_moments(model: DiffusionModel, texts: Sequence[str]) -> Float[Tensor, "d d"]:
    """sum k k' over all rows k that the denoiser is given of all texts, in the working dtype, a batch at a time.

    Zero for no texts. Raises ValueError for a text that the tokenizer would cut.
    """
    width = model.width("text")
    total = torch.zeros(width, width, dtype=working_dtype(model.device), device=model.device)
    for start in track(range(0, len(texts), ENCODED_AT_ONCE), "retained texts"):
        rows = to_working(model.encode(texts[start : start + ENCODED_AT_ONCE]).states).flatten(0, 1)
        total += rows.T @ rows
    return total
