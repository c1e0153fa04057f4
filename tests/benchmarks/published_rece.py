"""RECE's published arithmetic (arXiv 2407.12383; shared/methods/rece.md, sections 2, 4), written from its description.

A round finds for every concept c' = (rho I + sum W'W')^-1 (sum W'W0) c, W' the current and W0 the original matrices,
the sums formed anew in each round; then every matrix by itself is edited as in UCE, with an explicit inverse. A
prompt's rows are added by one matrix product, where the released code sums an outer product for every row, and the sums
are formed once a round, not for each concept: this is the faster way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inversion(weights: Sequence[Tensor], current: Sequence[Tensor], ridge: float) -> Tensor:
    """The matrix (d, d) that takes every c to its c'."""
    width = weights[0].shape[1]
    left = ridge * torch.eye(width, dtype=weights[0].dtype)
    right = torch.zeros(width, width, dtype=weights[0].dtype)
    for weight, now in zip(weights, current, strict=True):
        left += now.T @ now
        right += now.T @ weight
    return torch.inverse(left) @ right


def round_of(
    edited: Tensor,
    found: Sequence[Tensor],
    harmless: Sequence[Tensor],
    retained: Sequence[Tensor],
    l1: float,
    l2: float,
) -> Tensor:
    """W'' of one matrix (out, d). found, harmless: rows c' and c0 of each concept; retained: rows of each prompt."""
    first = l2 * edited
    second = l2 * torch.eye(edited.shape[1], dtype=edited.dtype)
    for rows, targets in zip(found, harmless, strict=True):
        first += (targets @ edited.T).T @ rows
        second += rows.T @ rows
    for rows in retained:
        first += l1 * (rows @ edited.T).T @ rows
        second += l1 * rows.T @ rows
    return first @ torch.inverse(second)


def edited(
    weights: Sequence[Tensor],
    started: Sequence[Tensor],
    concepts: Sequence[tuple[Tensor, Tensor]],
    retained: Sequence[Tensor],
    *,
    rounds: int,
    rho: float = 0.1,
    l1: float = 0.1,
    l2: float = 0.1,
) -> list[Tensor]:
    """All W' after the rounds, from weights that UCE has edited. concepts: (rows, harmless rows) of each."""
    current = list(started)
    for _ in range(rounds):
        to_found = inversion(weights, current, rho)
        found = [rows @ to_found.T for rows, _ in concepts]
        harmless = [targets for _, targets in concepts]
        current = [round_of(weight, found, harmless, retained, l1, l2) for weight in current]
    return current
