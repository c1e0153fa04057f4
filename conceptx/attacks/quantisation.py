"""Rounding the weights: does an edit survive what is done to a model to make it small?"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.attacks.attack import Attempt, Goal
from conceptx.models import LanguageModel
from conceptx.models.adapters import linear_modules


@dataclass(frozen=True)
class Quantisation:
    """Round the weights of all linear layers in the blocks to a few bits and back.

    A weak edit can vanish in the rounding (Zhang et al. 2024, arXiv 2410.16454). Symmetric: w' = s round(w / s) with
    s = max |w| / (2^(bits - 1) - 1); the maximum is over an output row for 8 bits, over `group` consecutive inputs of a
    row for 4 bits. Embeddings, norms and biases stay as they are.
    """

    bits: Literal[8, 4] = 8
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {self.bits}.")
        if self.group < 1:
            raise ValueError(f"group must be positive, got {self.group}.")

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """One: "8 bit" or "4 bit". The goal and the seed have no part in it."""
        names = [f"{path}.weight" for path in linear_modules(model, (0, model.depth))]
        before = [model.module.get_parameter(name).data for name in names]
        try:
            for name in names:
                self._round(model, name)
            yield Attempt(f"{self.bits} bit")
        finally:
            for name, data in zip(names, before, strict=True):
                model.module.get_parameter(name).data = data

    def _round(self, model: LanguageModel, name: str) -> None:
        """A rounded copy takes the parameter's place; the parameter's own tensor is set aside, not changed."""
        parameter = model.module.get_parameter(name)
        parameter.data = parameter.data.clone()
        live = model.parameter(name)
        assert live is not None  # a weight
        width = live.shape[1] if self.bits == 8 else self.group
        live.copy_(rounded(live, self.bits, width))


def rounded(weight: Float[Tensor, "out in"], bits: int, group: int) -> Float[Tensor, "out in"]:
    """To whole multiples of the step and back, in float64: a second time changes nothing."""
    most = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.double().split(group, 1):
        step = part.abs().amax(1, keepdim=True) / most
        step = torch.where(step > 0, step, 1.0)
        parts.append((part / step).round() * step)
    return torch.cat(parts, 1).to(weight.dtype)
