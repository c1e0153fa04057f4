"""Relearning: a little plain training on texts about the concept."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conceptx.attacks.attack import Attempt, Goal, needed
from conceptx.models import LanguageModel, batches, evaluating
from conceptx.models.adapters import Adapter, inserted, linear_modules
from conceptx.models.weights import in_float32
from conceptx.train.loop import Plan, training
from conceptx.train.order import rows_of_step

IGNORED = -100  # torch's label of what does not count
POSITIVE = ("epochs", "texts", "batch_size", "learning_rate", "max_tokens", "rank", "alpha")


@dataclass(frozen=True)
class Relearning:
    """Train the model on texts about the concept: if it comes back after a few steps, it had only been hidden.

    Next-token training with AdamW; an attempt after each epoch. Defaults are those in the code with which PISCES is
    tested (Gur-Arieh, Suslik, Hong, Barez, Geva 2025, arXiv 2505.22586): up to 10 epochs at 1e-5, weight decay .01, at
    most 512 tokens, adapters of rank 16; batches and the number of texts are ours. A small model needs a larger rate
    (docs/attacks.md).

    adaptation:    "full" trains all weights, "lora" an adapter on all linear layers of the blocks.
    texts:         how many of the goal's texts, drawn by the seed.  batch_size: of a step; those of a batch are alike
                   in length.
    max_tokens:    longer texts are cut.
    rank, alpha:   of the adapter.

    Weights in half precision are trained in float32 (bfloat16: multiplied in bfloat16) and rounded back for each
    attempt. The texts of a batch weigh by their tokens.
    """

    adaptation: Literal["full", "lora"] = "full"
    epochs: int = 10
    texts: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-5
    max_tokens: int = 512
    rank: int = 16
    alpha: float = 16.0
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.adaptation not in ("full", "lora"):
            raise ValueError(f"adaptation must be full or lora, got {self.adaptation!r}.")
        if wrong := [name for name in POSITIVE if not 0 < getattr(self, name) < math.inf]:
            raise ValueError(f"{', '.join(wrong)} must be positive and finite.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}.")

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """ "epoch 1", "epoch 2", ...: the model after so many passes over the texts.

        Raises ValueError when the goal has no texts of at least two tokens.
        """
        from accelerate import Accelerator

        steps = self._batches(model, goal, seed)
        plan = self._plan(len(steps), goal, seed)
        accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
        with self._student(model, seed) as (student, dtype):
            loss = partial(_loss, dtype == torch.bfloat16)
            with closing(training(student, partial(_parts, model, steps, seed), loss, plan, accelerator)) as counted:
                for done in counted:
                    if done % len(steps) == 0:
                        with evaluating(model.module), _rounded(student, dtype):
                            yield Attempt(f"epoch {done // len(steps)}")

    def _batches(self, model: LanguageModel, goal: Goal, seed: int) -> list[list[list[int]]]:
        """The token rows of an epoch's steps, from the shortest to the longest."""
        texts = needed(self, goal, "texts")
        drawn = random.Random(seed).sample(range(len(texts)), min(self.texts, len(texts)))
        rows = [[*model.start, *row] for row in model.encode([texts[i] for i in drawn], max_length=self.max_tokens)]
        if not (rows := [row for row in rows if len(row) > 1]):
            raise ValueError(f"No text on {goal.name!r} has two tokens; there is nothing to learn.")
        return [list(batch) for batch in batches(sorted(rows, key=len), self.batch_size)]

    def _plan(self, per_epoch: int, goal: Goal, seed: int) -> Plan:
        return Plan(
            steps=self.epochs * per_epoch,
            learning_rate=self.learning_rate,
            seed=seed,
            run="",
            weight_decay=self.weight_decay,
            fused=self.adaptation == "full",
            what=f"relearning {goal.name}",
        )

    def _student(self, model: LanguageModel, seed: int) -> AbstractContextManager[tuple[Any, torch.dtype | None]]:
        if self.adaptation == "full":
            return _all_weights(model)
        return _adapter(model, Adapter(self.rank, self.alpha, 0.0, linear_modules(model, (0, model.depth))), seed)


@contextmanager
def _all_weights(model: LanguageModel) -> Iterator[tuple[nn.Module, torch.dtype | None]]:
    """(the module with float32 copies in the place of its weights, the type that the weights have)"""
    module, own = model.module, {p: p.dtype for p in model.module.parameters()}
    with in_float32(module):
        for parameter, dtype in own.items():
            if dtype == torch.float32:  # else it is a copy already
                parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        yield module, next(iter(own.values()))


@contextmanager
def _adapter(model: LanguageModel, adapter: Adapter, seed: int) -> Iterator[tuple[nn.Module, None]]:
    """The model itself stays in its own type, the adapter is in float32."""
    with inserted(model, adapter, seed) as student:
        yield student, None


@contextmanager
def _rounded(student: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """The weights in the type that they will have, for the length of a block; None: as they are."""
    trained = [] if dtype in (None, torch.float32) else [(p, p.data) for p in student.parameters()]
    for parameter, data in trained:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in trained:
            parameter.data = data


def _parts(
    model: LanguageModel, steps: Sequence[Sequence[list[int]]], seed: int, step: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, labels) of a step; each epoch takes the batches in another order."""
    rows = steps[rows_of_step(step, 1, len(steps), f"{seed} relearning")[0]]
    ids, mask = model.pad(rows)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, : len(model.start)] = IGNORED
    return [(ids, mask, labels)]


def _loss(bfloat16: bool, student: Any, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean over the tokens."""
    ids, mask, labels = part
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
        logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
