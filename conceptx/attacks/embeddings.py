"""Words that stand in for learnt embeddings: a run of tokens whose rows a hook on the embedding table replaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@contextmanager
def standing_in(tables: Sequence[nn.Embedding], tokens: Sequence[int], rows: Float[Tensor, "m d"]) -> Iterator[None]:
    """Wherever the run of m tokens is looked up in one of the tables, it has these embeddings. Differentiable in them.

    The tables themselves stay untouched.
    """
    with ExitStack() as stack:
        for table in tables:
            stack.callback(table.register_forward_hook(partial(_swap, list(tokens), rows)).remove)
        yield


def _swap(
    tokens: list[int], rows: Float[Tensor, "m d"], _: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook of an embedding table."""
    starts = found(args[0], tokens)
    output = output.clone()
    for offset, row in enumerate(rows.to(output.device, output.dtype)):
        output[:, offset : offset + starts.shape[1]][starts] = row
    return output


def found(ids: Int[Tensor, "n length"], tokens: Sequence[int]) -> Bool[Tensor, "n places"]:
    """Where the run of m tokens begins, for each of the length - m + 1 places where it could."""
    if ids.shape[1] < len(tokens):
        return torch.zeros(len(ids), 0, dtype=torch.bool, device=ids.device)
    return (ids.unfold(1, len(tokens), 1) == torch.tensor(tokens, device=ids.device)).all(-1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient for the length of the block."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
