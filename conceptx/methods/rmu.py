"""RMU, Representation Misdirection for Unlearning (WMDP; Li et al. 2024, arXiv 2403.03218)."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, provenance, run_identity
from conceptx.models import LanguageModel, batches, evaluating
from conceptx.models.passes import activations
from conceptx.models.weights import Student, decoder_in_place
from conceptx.settings import require_positive, tunable
from conceptx.train.loop import Plan, train
from conceptx.train.order import rows_of_step

logger = logging.getLogger("conceptx")
Rows = list[list[int]]  # token ids of texts
POSITIVE = ("trained", "coefficient", "steps", "batch_size", "learning_rate", "max_tokens")
MEASURED = 64  # texts of the concept from which the length of its states is taken


@dataclass(frozen=True)
class RMU(Eraser):
    """Fine-tune a few MLPs so that texts on the concept give one meaningless hidden state (arXiv 2403.03218, §4).

    The loss is mean (h(forget) - c u)^2 + alpha mean (h(retain) - h_frozen(retain))^2, over tokens and dimensions; h is
    the output of a block. u is a random vector with entries uniform on [0, 1), scaled to length one; there is one for
    each concept and seed.

    layer:         the block, counted from 0, whose output h is. Later ones are neither trained nor run.
    trained:       how many down projections of MLPs are trained: those of the blocks up to `layer`.
    coefficient:   c, the steering coefficient.
    relative:      c is `coefficient` times the median length of h on the concept's texts. The published numbers are
                   absolute and fit one model; on another, a c that is small beside h does little.
    retain_weight: alpha.
    steps, batch_size, learning_rate: of AdamW; batch_size texts of each kind a step.
    max_tokens:    longer texts are cut.

    Defaults are those for Zephyr-7B; `steps` is not settled by the sources (80 to 150 batches). Different from the
    authors' code: padding does not count, nor do the tokens that the tokenizer puts before a text; no dropout and no
    weight decay; h_frozen comes from the same model, with its old weights swapped in once a step, so that the memory is
    that of the trained matrices and not of a second model. Matrices in half precision are trained in float32 copies (a
    model in float16 wholly so: its gradients would vanish). One concept a run; edits add up.
    """

    layer: int = tunable(7, 3, 15)
    trained: int = 3
    coefficient: float = tunable(6.5, 1.0, 1000.0, log=True)  # c
    relative: bool = False
    retain_weight: float = tunable(1200.0, 1.0, 3000.0, log=True)  # α
    steps: int = tunable(150, 50, 300)
    batch_size: int = 4
    learning_rate: float = tunable(5e-5, 1e-5, 1e-3, log=True)
    max_tokens: int = 512

    def __post_init__(self) -> None:
        require_positive(self, *POSITIVE)
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must not be negative, got {self.retain_weight}.")
        if not 0 < self.trained <= self.layer + 1:
            raise ValueError(f"There are {self.layer + 1} blocks up to layer {self.layer}, trained is {self.trained}.")

    def erase(
        self, model: LanguageModel, concept: Concept, *, seed: int = 0, checkpoint: str | Path | None = None
    ) -> Edit:
        """Train, and return the change as an edit of dense weight changes. The model stays as it is.

        checkpoint: a folder for the training state; run the same call again after an interruption and it goes on where
                    it stopped, with the same result. One process only.

        Raises ValueError when the concept has no texts or no retain_texts, when the layer is not in the model, when an
        edit is in force on it, when several processes call it, or when the checkpoint belongs to another run.
        """
        from accelerate import Accelerator

        self._check(model, concept)
        record = provenance(self, concept, seed)
        texts = {"forget": self._rows(model, concept.texts), "retain": self._rows(model, concept.retain_texts)}
        target = self._length(model, texts["forget"]) * unit_vector(model.width(self.site), concept.name, seed)
        accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
        if accelerator.num_processes > 1:
            raise ValueError(f"RMU trains in one process, there are {accelerator.num_processes}; start it alone.")
        run = run_identity(record, concept, model)
        plan = Plan.bare(self.steps, self.learning_rate, seed=seed, run=run, folder=checkpoint)
        with decoder_in_place(model.module, self._parameters(model)) as student:
            steps = _Steps(self, model, student, texts, target.to(model.device), seed)
            train(student.module, steps.of, steps.loss, plan, accelerator)
            deltas = student.deltas()
        return Edit(model.fingerprint, deltas=deltas, provenance=(record,))

    @property
    def site(self) -> str:
        """Where h is."""
        return f"layers.{self.layer}.output"

    def _check(self, model: LanguageModel, concept: Concept) -> None:
        self._require(concept, "texts", "retain_texts")
        self._accept(model)
        if self.layer >= model.depth:
            raise ValueError(f"There is no layer {self.layer}; the model has {model.depth}, 0 to {model.depth - 1}.")

    def _rows(self, model: LanguageModel, texts: Sequence[str]) -> Rows:
        return model.encode(texts, max_length=self.max_tokens)

    def _parameters(self, model: LanguageModel) -> list[str]:
        """The names of the weights that are trained."""
        return [model.written(layer)[1] for layer in range(self.layer - self.trained + 1, self.layer + 1)]

    def _length(self, model: LanguageModel, rows: Rows) -> float:
        """c, the norm of the target."""
        if not self.relative:
            return self.coefficient
        length = typical_length(model, rows[:MEASURED], self.site)
        logger.info("median length of the concept's states at layer %d: %.3f", self.layer, length)
        return self.coefficient * length


def unit_vector(width: int, name: str, seed: int) -> Tensor:
    """u (width,), float32: uniform on [0, 1), then of length one; a function of the concept's name and the seed."""
    number = random.Random(f"{seed} {name}").getrandbits(63)
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (drawn / drawn.norm()).float()


@torch.no_grad()
def typical_length(model: LanguageModel, rows: Rows, site: str) -> float:
    """The median length of the states at a site over the tokens of all rows.

    Not the mean: the first token of a text can have states a hundred times as long as all others (an attention sink).
    """
    lengths = [_states(model, chunk, site).norm(dim=1) for chunk in batches(rows, 8)]
    return float(torch.cat(lengths).median())


def _states(model: LanguageModel, rows: Sequence[Sequence[int]], site: str) -> Tensor:
    """The states (tokens, d) of all rows in float32, without padding and what stands before a text."""
    ids, mask = model.pad([[*model.start, *row] for row in rows])
    with evaluating(model.module):
        states = activations(model, ids, mask, [site])[site]
    kept = mask.clone()
    kept[:, : len(model.start)] = 0
    return states[kept.bool()].float()


@dataclass(frozen=True, eq=False)
class _Steps:
    """The texts of a step, a function of its number, and their loss."""

    settings: RMU
    model: LanguageModel
    student: Student
    texts: dict[str, Rows]
    target: Tensor  # c u
    seed: int

    def of(self, step: int) -> list[tuple[str, Rows]]:
        """(kind, rows) of both kinds of texts."""
        size = self.settings.batch_size
        return [
            (kind, [rows[i] for i in rows_of_step(step, size, len(rows), f"{self.seed} {kind}")])
            for kind, rows in self.texts.items()
        ]

    def loss(self, _: Any, part: tuple[str, Rows]) -> Tensor:
        """The forget term or the weighted retain term."""
        kind, rows = part
        states = self._states(rows)
        if kind == "forget":
            return (states - self.target).square().mean()
        with torch.no_grad(), self.student.teacher():
            frozen = self._states(rows)
        return self.settings.retain_weight * (states - frozen).square().mean()

    def _states(self, rows: Rows) -> Tensor:
        return _states(self.model, rows, self.settings.site)
