"""SPEED's published arithmetic (arXiv 2503.07392; shared/methods/speed.md, sections 3-6), written from its description.

Matrix by matrix: the unconstrained edit by an explicit inverse, the filter of the retained rows, the directions of W by
a full singular value decomposition, augmented rows formed in batches of 8 retained rows and filtered in chunks of 128,
their outer products summed, the null space by another decomposition, then the closed form as it stands. Outer products
of many rows are one matrix product; the direction of augmentation is chosen as the library says (zeros included).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK, BATCH = 128, 8  # retained rows
Steps = Callable[[int, int], Tensor]  # (first, last) of the kept rows -> normal numbers (rows, N_A, d)


def smallest_directions(weight: Tensor, count: int) -> Tensor:
    """P_min (d, d): of all right-singular directions the last."""
    basis = torch.linalg.svd(weight, full_matrices=True).Vh[-count:]
    return basis.T @ basis


def above(shifts: Tensor, scale: float) -> Tensor:
    return shifts >= scale * shifts.mean()


def refined(
    weight: Tensor,
    keys: Tensor,
    anchors: Tensor,
    retained: Tensor,
    steps: Steps,
    *,
    concepts: int,
    scale: float = 1.0,
    filtered: bool = True,
    chunk: int | None = CHUNK,
    quiet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean outer product of the refined retained rows (d, d), which of the retained were kept); chunk None: all."""
    width = keys.shape[1]
    own, cross = keys.T @ keys / concepts, anchors.T @ keys / concepts
    change = weight @ (cross - own) @ torch.inverse(torch.eye(width, dtype=keys.dtype) + own)
    kept = torch.ones(len(retained), dtype=torch.bool)
    if filtered:
        kept = above((retained @ change.T).norm(dim=1), scale)
    rows = retained[kept]
    quiet = smallest_directions(weight, 1) if quiet is None else quiet
    total, count = rows.T @ rows, len(rows)
    for start in range(0, len(rows), chunk or max(len(rows), 1)):
        stop = min(start + (chunk or len(rows)), len(rows))
        parts, shifts = [], []
        for first in range(start, stop, BATCH):
            last = min(first + BATCH, stop)
            augmented = (rows[first:last, None] + steps(first, last) @ quiet).flatten(0, 1)
            parts.append(augmented)
            shifts.append((augmented @ change.T).norm(dim=1))
        chosen = torch.cat(parts)[above(torch.cat(shifts), scale)]
        total, count = total + chosen.T @ chosen, count + len(chosen)
    return total / max(count, 1), kept


def edited(
    weight: Tensor,
    keys: Tensor,
    anchors: Tensor,
    second: Tensor,
    invariants: Tensor,
    *,
    concepts: int,
    tau: float = 0.1,
    s: float = 1.0,
    slack: float = 0.0,
) -> Tensor:
    """W' of one matrix (out, d), from the mean outer product of its refined retained rows."""
    width = keys.shape[1]
    identity = torch.eye(width, dtype=keys.dtype)
    basis, values, _ = torch.linalg.svd(second)
    quiet = basis[:, values < tau]
    project = quiet @ quiet.T
    own, cross = keys.T @ keys / concepts, anchors.T @ keys / concepts
    left, fixed = torch.inverse(own @ project + s * identity), invariants.T
    inner = fixed.T @ project @ left @ fixed + slack * torch.eye(len(invariants), dtype=keys.dtype)
    hold = identity - left @ fixed @ torch.inverse(inner) @ fixed.T @ project
    return weight + weight @ (cross - own) @ project @ hold @ left
