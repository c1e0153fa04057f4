"""How a testbed is trained: in stages, each a file that is not made twice.

A stage's data is a function of its step number, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conceptx.store import load_tensors, save_tensors
from conceptx.train.loop import Plan, train

CHECKPOINT_EVERY = 250


def warm_cosine(done: float, flat: float, warm: float = 0.03) -> float:
    """Linear warm-up, constant up to the share `flat`, then half a cosine down to 2 %."""
    if done < warm:
        return done / warm + 1e-3
    fallen = max(0.0, (done - flat) / (1 - flat))
    return 0.02 + 0.98 * (1 + math.cos(math.pi * fallen)) / 2


@dataclass(frozen=True)
class Stages:
    """Where the parts of one recipe lie.

    recipe: identifies what is trained and how; a checkpoint of another recipe is refused.
    """

    folder: Path
    recipe: str
    seed: int

    def finished(self, name: str, module: nn.Module, make: Callable[[nn.Module], None]) -> Any:
        """The module with its trained weights, trained now by `make` unless they are there."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            make(module)
            save_tensors(path, {key: value.contiguous() for key, value in module.state_dict().items()})
            (self.folder / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)
        module.load_state_dict(load_tensors(path))
        return module.eval().requires_grad_(False)

    def train(
        self,
        name: str,
        student: nn.Module,
        data: Callable[[int], Any],
        loss: Callable[[Any, Any], Tensor],
        steps: int,
        **plan: Any,
    ) -> None:
        """Train `student` on `data(step)` for some steps; `plan` overrides fields of `Plan`."""
        from accelerate import Accelerator

        settings: dict[str, Any] = {"betas": (0.9, 0.99), "schedule": partial(warm_cosine, flat=0.4), "average": 0.998}
        whole = Plan(
            steps=steps,
            seed=self.seed,
            run=f"{self.recipe} {name}",
            checkpoint=self.folder / f"{name}.checkpoint.safetensors",
            checkpoint_every=CHECKPOINT_EVERY,
            what=name,
            **{**settings, **plan},
        )
        train(student, lambda step: [data(step)], loss, whole, Accelerator(cpu=True))

    def numbers(self, name: str, step: int) -> tuple[torch.Generator, random.Random]:
        """Random numbers of one step of one stage."""
        draw = random.Random(f"{self.seed} {name} {step}")
        return torch.Generator().manual_seed(draw.getrandbits(60)), draw
