"""EAR, Erasing Concepts from Unified Autoregressive Models (Fan et al. 2025, arXiv 2506.20151)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conceptx.concept import Concept, pairs_of
from conceptx.edit import Edit
from conceptx.eraser import Eraser, as_concepts, provenance, run_identity
from conceptx.geometry import steer
from conceptx.models import ARImageModel, ImagePrompts, evaluating
from conceptx.models.adapters import Adapter, adapter_in_place
from conceptx.models.weights import Student, decoder_in_place
from conceptx.settings import require_choices, require_positive, tunable
from conceptx.train.loop import Plan, train
from conceptx.train.processes import one_process

Context = Literal["full", "none"]
Pairs = Sequence[tuple[str, str]]  # (a prompt that shows the concept, the same prompt without it)


@dataclass(frozen=True)
class EAR(Eraser):
    """Fine-tune attention so that the hidden states behind image tokens turn away from the concept (arXiv 2506.20151).

    For image token i the loss is l_i = mean (h_theta(u) - y)^2 with y = h(s) - eta (h(u) - h(n)) of the frozen model,
    h its last hidden state (spec, §2). u is a picture in the making of the prompt with the concept; s and n are two of
    the prompt without it. The mean is over the dimensions and over two rows, the prompt and its masked form, between
    which the guidance acts. The losses of a window are summed to A (windowed gradient accumulation), and A <= mu is
    left out (thresholded loss masking).

    layers:            half-open range of the decoder's layers whose q, k, v and o projections are trained.
    negative_guidance: eta.
    window:            tokens between two updates (published: church 48, nudity 100, Van Gogh 12). A picture's last one
                       may be shorter.
    threshold:         mu. It bounds a sum: for twice the window it is half as strict.
    guidance, temperature: of the frozen model's samples.
    context:           "full": the student reads prompt and earlier tokens, as the paper describes. "none": what the
                       published code does: from the second token on each token is read by itself, at place 0, without
                       prompt; q and k then learn from the first term alone, which covers all tokens of the prompt.
    shared:            u, s and n have one token stream, that of u; else each has its own, and h(u) - h(n) mixes the
                       concept with the difference of two samples (published).
    rank:              None: the projections themselves. A number: a LoRA adapter of that rank on them.
    passes:            how often every pair is drawn, each time anew.  batch_size: pairs that are drawn side by side.
    learning_rate:     of Adam.

    Pairs are the concept's `pairs`; without them, its `prompts` (or its name), with the anchor in its name's place.
    Defaults are those of the church model. Different from the authors' code: the shorter window at a picture's end is
    trained (there it is thrown away); prompts have the chat template and begin-of-image token that `generate` gives
    them; with "none" the prompts' states are compared at their ends, over the length of the shorter; a window does not
    hand gradients to the keys and values of what came before it.
    """

    layers: tuple[int, int] = (0, 5)
    negative_guidance: float = tunable(1.0, 0.5, 8.0, log=True)  # η
    window: int = tunable(48, 4, 96)
    threshold: float = tunable(0.05, 0.0, 5.0)  # μ
    guidance: float = 5.0
    temperature: float = 1.0
    context: Context = "full"
    shared: bool = False
    rank: int | None = None
    passes: int = tunable(1, 1, 4)
    batch_size: int = 1
    learning_rate: float = tunable(1e-4, 1e-5, 3e-3, log=True)

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "window", "rank", "passes", "batch_size", "learning_rate", "temperature")
        if not (math.isfinite(self.negative_guidance) and math.isfinite(self.guidance)):
            raise ValueError("negative_guidance and guidance must be finite.")
        if math.isnan(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}.")

    def erase(
        self,
        model: ARImageModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Edit:
        """Train, and return the change as an edit: dense, or low-rank with an adapter. The model stays as it is.

        Weights in half precision are trained in float32.
        concept:    one or several; their pairs share the steps.
        checkpoint: a folder for the training state; run the same call again after an interruption and it goes on where
                    it stopped, with the same result. One process only.

        Raises ValueError when no concept is given, when it has neither pairs nor an anchor, when a prompt does not hold
        its name or is too long, when the layers leave the model, when an edit is in force on the model, when several
        processes call it, or when the checkpoint belongs to another run.
        """
        self._accept(model)
        first, end = self.layers
        if not 0 <= first < end <= model.depth:
            raise ValueError(f"The layers {first}..{end - 1} are not a range inside the model's {model.depth} layers.")
        concepts = as_concepts(concept)
        pairs = [pair for each in concepts for pair in pairs_of(each)]
        model.prompts([text for pair in pairs for text in pair])
        record = provenance(self, concepts, seed)
        run, count = run_identity(record, concepts, model), self.steps(model, len(pairs))
        plan = Plan.bare(count, self.learning_rate, seed=seed, run=run, folder=checkpoint)
        accelerator = one_process(model.device, "EAR")
        with self._student(model, seed) as student:
            steps = _Steps(self, model, student, pairs, seed)
            train(student.module, steps.of, steps.loss, plan, accelerator)
            deltas = student.deltas()
        return Edit(model.fingerprint, deltas=deltas, provenance=(record,))

    def steps(self, model: ARImageModel, pairs: int) -> int:
        """How many windows the pictures of so many pairs have."""
        return self.passes * math.ceil(pairs / self.batch_size) * self.windows(model)

    def windows(self, model: ARImageModel) -> int:
        """How many updates a picture gives at most."""
        return math.ceil(model.image_tokens / self.window)

    def _student(self, model: ARImageModel, seed: int) -> AbstractContextManager[Student]:
        names = [name for layer in range(*self.layers) for name in model.attention(layer)]
        if self.rank is None:
            return decoder_in_place(model.module, names)
        paths = tuple(name.removesuffix(".weight") for name in names)
        return adapter_in_place(model, Adapter(self.rank, self.rank, 0.0, paths), seed)


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _States:
    """Hidden states of a window: the first token's (n, p, d), one or a whole prompt's, and the others' (n, t, d).

    A window that does not begin with a picture's first token has p = 0.
    """

    first: Tensor
    others: Tensor

    def part(self, first: int, end: int) -> _States:
        """Of the tokens first .. end - 1, out of those of a whole picture."""
        return _States(self.first if first == 0 else self.first[:, :0], self.others[:, max(first - 1, 0) : end - 1])

    def ends(self, length: int) -> _States:
        """With the last states only of what stands for the first token."""
        return _States(self.first[:, self.first.shape[1] - length :], self.others)

    def loss(self, target: _States) -> Tensor:
        """A: the sum over tokens of the mean squared distance."""
        common = min(self.first.shape[1], target.first.shape[1])
        gap = self.ends(common).first - target.ends(common).first
        found = (self.others - target.others).square().mean((0, 2)).sum()
        return found + gap.square().mean() if common else found


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Pictures in the making: rows of the prompts and of their masked form, their tokens, and y."""

    prompts: ImagePrompts
    tokens: Tensor
    target: _States


@dataclass(frozen=True)
class _Steps:
    """The window of a step: a function of its number. The pictures of the last step are remembered."""

    settings: EAR
    model: ARImageModel
    student: Student
    pairs: Pairs
    seed: int
    _last: dict[int, _Drawn] = field(default_factory=dict)

    def of(self, step: int) -> list[tuple[_Drawn, int]]:
        """(pictures, the window's first token)."""
        number, window = divmod(step, self.settings.windows(self.model))
        if number not in self._last:
            self._last.clear()
            self._last[number] = self._draw(number)
        return [(self._last[number], window * self.settings.window)]

    def loss(self, _: Any, part: tuple[_Drawn, int]) -> Tensor | None:
        """A, or None where it is small. The student is the model's own decoder."""
        drawn, first = part
        end = min(first + self.settings.window, self.model.image_tokens)
        found = self._window(drawn.prompts, drawn.tokens, first, end).loss(drawn.target.part(first, end))
        return found if float(found.detach()) > self.settings.threshold else None

    @torch.no_grad()
    def _draw(self, number: int) -> _Drawn:
        """The frozen model's pictures of some pairs, with y."""
        s, count = self.settings, len(self.pairs)
        turn, place = divmod(number, math.ceil(count / s.batch_size))
        order = random.Random(f"{self.seed} {turn}").sample(range(count), count)
        rows = order[place * s.batch_size : (place + 1) * s.batch_size]
        with self.student.teacher():
            unsafe, safe = (self.model.prompts([self.pairs[row][side] for row in rows]) for side in (0, 1))
            u = self._sampled(unsafe, f"{number} u")
            tokens = {"u": u, **{key: u if s.shared else self._sampled(safe, f"{number} {key}") for key in ("n", "s")}}
            away, neutral, towards = (
                self._window(self._both(prompts), tokens[key].repeat(2, 1), 0, self.model.image_tokens)
                for key, prompts in (("u", unsafe), ("n", safe), ("s", safe))
            )
        return _Drawn(self._both(unsafe), u.repeat(2, 1), _steered(towards, neutral, away, s.negative_guidance))

    def _both(self, prompts: ImagePrompts) -> ImagePrompts:
        return prompts + self.model.unconditional(prompts)

    def _sampled(self, prompts: ImagePrompts, what: str) -> Tensor:
        draw = random.Random(f"{self.seed} {what}")
        seeds = [draw.getrandbits(31) for _ in range(len(prompts))]
        s = self.settings
        return self.model.sample(prompts, seeds=seeds, guidance=s.guidance, temperature=s.temperature)

    def _window(self, prompts: ImagePrompts, tokens: Tensor, first: int, end: int) -> _States:
        """The states that predict the tokens first .. end - 1, as `context` says."""
        with evaluating(self.model.module):
            if self.settings.context == "full":
                states = self.model.predict(prompts, tokens[:, : end - 1], since=first).float()
                begins = 1 if first == 0 else 0
                return _States(states[:, :begins], states[:, begins:])
            alone = self.model.predict_alone(tokens[:, max(first - 1, 0) : end - 1]).float()
            return _States(self.model.predict_prompts(prompts).float() if first == 0 else alone[:, :0], alone)


def _steered(towards: _States, neutral: _States, away: _States, eta: float) -> _States:
    """y = h(s) - eta (h(u) - h(n))"""
    common = min(towards.first.shape[1], away.first.shape[1])
    base, still, unsafe = (states.ends(common) for states in (towards, neutral, away))
    return _States(
        steer(base.first, still.first, [unsafe.first], [-eta]),
        steer(base.others, still.others, [unsafe.others], [-eta]),
    )
