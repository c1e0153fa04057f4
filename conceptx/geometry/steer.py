"""Steering in the space of outputs: noise predictions, log-probabilities or hidden states obey the same algebra."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def steer(base: Tensor, neutral: Tensor, concepts: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """base + sum_i w_i (concept_i - neutral), all of one shape; a weight is a number or broadcasts.

    ESD: base = neutral = out(empty), w = -eta. ELM: base = log p, concept = log p_novice, neutral = log p_expert,
    w = eta. Raises ValueError when the numbers of concepts and weights differ.
    """
    if len(concepts) != len(weights):
        raise ValueError(f"{len(concepts)} concepts need as many weights, got {len(weights)}.")
    return base + sum(weight * (concept - neutral) for concept, weight in zip(concepts, weights, strict=True))
