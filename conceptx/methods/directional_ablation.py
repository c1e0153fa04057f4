"""Directional ablation, or "abliteration" (Arditi et al. 2024, arXiv 2406.11717), in the form of the tool heretic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, provenance
from conceptx.models import LanguageModel, batches
from conceptx.progress import track
from conceptx.settings import tunable

Positions = Literal["all", "last"]
CHUNK = 32  # texts a forward pass


@dataclass(frozen=True)
class DirectionalAblation(Eraser):
    """Take one direction out of everything that blocks write to the residual stream (arXiv 2406.11717, §2.3, §4.1).

    The direction v of a layer is mean(texts) - mean(retain_texts) of the residual stream behind that block, made
    orthogonal to mean(retain_texts), of length one. The output projection of the attention and the down projection of
    the MLP become W - lambda v v' W, a change of rank one. Closed form; the seed plays no part.

    positions:  which tokens the means are over: "all" of every text, or the "last" one of each (for prompts).
    direction:  "per_layer": both matrices of a block use the v of the residual stream behind that same block. A number
                from 0 to 1: all blocks use one v, taken at that share of the way from the first block to the last
                (between two blocks: of both, in proportion).
    attention_maximum, attention_position, attention_minimum, attention_distance: lambda of the attention's matrices,
                over the blocks. It is the maximum at the position, falls linearly to minimum times the maximum at that
                distance from it on either side, and is zero farther away. Position and distance are shares of the way
                from the first block to the last.
    mlp_maximum, mlp_position, mlp_minimum, mlp_distance: the same for the down projections of the MLPs.

    By default lambda is 1 in all blocks, as in the paper, with one direction for each layer. Neither paper nor tool is
    about concepts: texts on the concept against others, in the place of prompts that are refused and others, are ours,
    and so is the mean over all tokens. Different from the paper: it takes one direction, chosen by trials, and edits
    the embeddings too. Different from the tool: it searches the numbers by trials (here `conceptx tune` does), starts
    at the first generated token, and offers winsorised means and kept row norms. Biases stay. Where a norm stands
    between a sublayer and the residual stream (Gemma 2 and 3), its gains are not accounted for.
    """

    positions: Literal["all", "last"] = tunable("all", choices=("all", "last"))
    direction: Literal["per_layer"] | float = tunable("per_layer", choices=("per_layer", 0.3, 0.45, 0.6, 0.75))
    attention_maximum: float = tunable(1.0, 0.0, 1.5)  # λ at its largest
    attention_position: float = tunable(0.5, 0.0, 1.0)
    attention_minimum: float = tunable(1.0, 0.0, 1.0)
    attention_distance: float = tunable(1.0, 0.1, 1.0)
    mlp_maximum: float = tunable(1.0, 0.0, 1.5)
    mlp_position: float = tunable(0.5, 0.0, 1.0)
    mlp_minimum: float = tunable(1.0, 0.0, 1.0)
    mlp_distance: float = tunable(1.0, 0.1, 1.0)

    def __post_init__(self) -> None:
        if self.positions not in ("all", "last"):
            raise ValueError(f"positions must be one of all, last, got {self.positions!r}.")
        if isinstance(self.direction, str) and self.direction != "per_layer":
            raise ValueError(f"direction must be 'per_layer' or a number from 0 to 1, got {self.direction!r}.")
        shares = [f"{part}_{name}" for part in ("attention", "mlp") for name in ("position", "minimum")]
        shares += ["direction"] * (self.direction != "per_layer")
        if wrong := [name for name in shares if not 0 <= getattr(self, name) <= 1]:
            raise ValueError(f"{', '.join(wrong)} must lie between 0 and 1.")
        if not all(0 <= maximum < math.inf for maximum in (self.attention_maximum, self.mlp_maximum)):
            raise ValueError("attention_maximum and mlp_maximum must not be negative and must be finite.")
        if not all(0 < distance < math.inf for distance in (self.attention_distance, self.mlp_distance)):
            raise ValueError("attention_distance and mlp_distance must be positive and finite.")

    def erase(self, model: LanguageModel, concept: Concept, *, seed: int = 0) -> Edit:
        """The change as an edit of rank-one weight changes, which `export_peft` writes as they are.

        Matrices with a lambda of zero are left out. Raises ValueError when the concept has no texts or no retain_texts,
        or when an edit is in force on the model.
        """
        self._require(concept, "texts", "retain_texts")
        self._accept(model)
        target, neutral = (means(model, texts, self.positions) for texts in (concept.texts, concept.retain_texts))
        found = self._chosen(directions(target, neutral))
        deltas = {
            name: ablation(model, name, v, strength)
            for v, matrices in zip(found, self._matrices(model), strict=True)
            for name, strength in matrices
            if strength
        }
        return Edit(model.fingerprint, deltas=deltas, provenance=(provenance(self, concept, seed),))

    def _chosen(self, per_layer: Tensor) -> Tensor:
        """(layers, d): the direction that each layer uses."""
        if isinstance(self.direction, str):
            return per_layer
        place = self.direction * (len(per_layer) - 1)
        below, above = per_layer[math.floor(place)], per_layer[math.ceil(place)]
        return normalize(torch.lerp(below, above, place % 1), dim=0).expand_as(per_layer)

    def _matrices(self, model: LanguageModel) -> Iterator[list[tuple[str, float]]]:
        """(parameter, lambda) of both matrices of each layer."""
        kernels = zip(self._strengths("attention", model.depth), self._strengths("mlp", model.depth), strict=True)
        for layer, strengths in enumerate(kernels):
            yield list(zip(model.written(layer), strengths, strict=True))

    def _strengths(self, part: str, depth: int) -> list[float]:
        numbers = (getattr(self, f"{part}_{name}") for name in ("maximum", "position", "minimum", "distance"))
        return kernel(depth, *numbers)


def means(model: LanguageModel, texts: Sequence[str], positions: Positions) -> Tensor:
    """(layers, d), float64: the mean residual stream behind each block, over all tokens or the last of each text."""
    sites = [f"layers.{layer}.output" for layer in range(model.depth)]
    lengths = list(batches([len(row) for row in model.encode(texts)], CHUNK))
    recorded = zip(lengths, model.record(texts, sites, batch_size=CHUNK), strict=True)
    total, count = torch.zeros(len(sites), model.width(sites[0]), dtype=torch.float64), 0
    for sizes, states in track(recorded, "recording the residual stream", total=len(lengths)):
        last = torch.tensor(list(accumulate(sizes))) - 1
        kept = last if positions == "last" else torch.arange(sum(sizes))
        count += len(kept)
        total += torch.stack([states[site].cpu()[kept].double().sum(0) for site in sites])
    return total / count


def directions(target: Tensor, neutral: Tensor) -> Tensor:
    """(layers, d): target - neutral, orthogonal to neutral, of length one, row by row."""
    along = normalize(neutral, dim=1)
    difference = target - neutral
    return normalize(difference - (difference * along).sum(1, keepdim=True) * along, dim=1)


def ablation(model: LanguageModel, name: str, v: Tensor, strength: float) -> LowRank:
    """- strength v v' W, for a weight W (out, in) and a direction v (out,)."""
    weight = model.parameter(name)
    assert weight is not None
    read = v @ weight.detach().cpu().double()
    return LowRank((-strength * v)[:, None].float(), read[None].float())


def kernel(depth: int, maximum: float, position: float, minimum: float, distance: float) -> list[float]:
    """Lambda of each layer: a peak with linear flanks, see `DirectionalAblation`."""
    peak, reach = position * (depth - 1), distance * max(depth - 1, 1)
    away = [abs(layer - peak) / reach for layer in range(depth)]
    rounding = 1e-9  # so that a layer exactly at the distance is inside
    return [maximum * (1 - a * (1 - minimum)) if a <= 1 + rounding else 0.0 for a in away]
