"""UCE's published arithmetic (arXiv 2308.14761; shared/methods/uce.md, sections 3 and 6), written from its description.

Every matrix by itself: A = ridge W and B = ridge I; each erased prompt adds alpha v* c' to A and alpha c c' to B, each
retained prompt beta W c c' and beta c c'; then W' = A B^-1 with an explicit inverse. A prompt's rows are added by one
matrix product; the released code forms an outer product for every row and sums them, so this is the faster of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Target = Callable[[Tensor, Tensor, Tensor], Tensor]  # W, rows of the prompt, rows of its anchor -> V* (rows, out)


def replaced(weight: Tensor, rows: Tensor, anchor: Tensor) -> Tensor:
    """v* = W c*."""
    return anchor @ weight.T


def orthogonal(weight: Tensor, rows: Tensor, anchor: Tensor) -> Tensor:
    """v* = W c* - <u, W c*> u, u = W c / |W c| over the whole block ("tensor")."""
    old, new = rows @ weight.T, anchor @ weight.T
    unit = old / old.norm()
    return new - (unit * new).sum() * unit


def edited(
    weight: Tensor,
    prompts: Sequence[tuple[Tensor, Tensor]],
    retained: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    ridge: float = 0.5,
    target: Target = replaced,
) -> Tensor:
    """W' of one matrix (out, d). prompts: (rows, anchor rows) of each, (r, d); retained: rows of each."""
    beta = max(0.1, 1 / max(len(retained), 1)) if beta is None else beta
    first = ridge * weight
    second = ridge * torch.eye(weight.shape[1], dtype=weight.dtype)
    for rows, anchor in prompts:
        first += alpha * target(weight, rows, anchor).T @ rows
        second += alpha * rows.T @ rows
    for rows in retained:
        first += beta * (rows @ weight.T).T @ rows
        second += beta * rows.T @ rows
    return first @ torch.inverse(second)
