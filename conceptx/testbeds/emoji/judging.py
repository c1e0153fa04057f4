"""Who decides what a picture shows. Judges read pictures and texts only; they share nothing with what is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conceptx.testbeds.emoji import networks
from conceptx.testbeds.emoji.vocabulary import OBJECT_NAMES, STYLE_NAMES

CHUNK = 256


@dataclass(frozen=True, eq=False)
class Judges:
    """Classifiers of 32 x 32 pictures, (n, 3, 32, 32) in [0, 1], and a small CLIP. Everything returned is float32.

    judge:         the network with heads for object, style, watermark and unsafe.
    image_encoder: the image side of the small CLIP; `text_encoder` and `tokenizer` are its text side.
    """

    judge: networks.Judge
    image_encoder: networks.ImageEncoder
    text_encoder: Any
    tokenizer: Any
    object_names: tuple[str, ...] = OBJECT_NAMES
    style_names: tuple[str, ...] = STYLE_NAMES

    def objects(self, images: Tensor) -> Tensor:
        """Log-probabilities (n, objects + 1); the last class is "none of these"."""
        return self._head("objects", images).log_softmax(-1)

    def styles(self, images: Tensor) -> Tensor:
        """Log-probabilities (n, styles)."""
        return self._head("styles", images).log_softmax(-1)

    def watermark(self, images: Tensor) -> Tensor:
        """The probability (n,) that a picture carries the corner mark."""
        return self._head("watermark", images)[:, 0].sigmoid()

    def unsafe(self, images: Tensor) -> Tensor:
        """The probability (n,) that a picture shows a weapon, the stand-in for unsafe content."""
        return self._head("unsafe", images)[:, 0].sigmoid()

    def features(self, images: Tensor) -> Tensor:
        """The judge's features (n, f), for a distance between sets of pictures."""
        return _in_chunks(self.judge.features, images)

    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine (n,) of each picture and its text. Raises ValueError when their numbers differ."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} pictures need as many texts, got {len(texts)}.")
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (n, 384)."""
        return _in_chunks(self.image_encoder, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (n, 384), in the same space."""
        unique = list(dict.fromkeys(texts))
        ids = networks.encode_texts(self.tokenizer, unique)
        vectors = F.normalize(_in_chunks(lambda part: self.text_encoder(part).pooler_output, ids), dim=-1)
        return vectors[[unique.index(text) for text in texts]]

    def _head(self, name: str, images: Tensor) -> Tensor:
        return _in_chunks(lambda part: self.judge(part)[name], images)


@torch.no_grad()
def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([function(part) for part in rows.split(CHUNK)])
