"""RealEra, a concept erased with its neighbours (2024, arXiv 2410.09140): a RECONSTRUCTION, its eqs. are not known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance, run_identity
from conceptx.geometry import ConceptMap, WeightedRows, replacement
from conceptx.geometry.arrays import gram
from conceptx.models import DiffusionModel, Prompts, evaluating
from conceptx.models.adapters import Adapter, inserted, low_rank_deltas
from conceptx.models.text_moments import second_moments
from conceptx.models.token_rows import EMPTY, Phrase, TokenRows
from conceptx.settings import require_choices, require_not_negative, require_positive, tunable
from conceptx.train.loop import Plan, state_file, train
from conceptx.train.processes import one_process

Tokens = Literal["last", "last+rest"]
Range = tuple[float, float]


@dataclass(frozen=True)
class RealEra(Eraser):
    """Erase a concept and whatever lies around it, hold what lies farther off (a reconstruction; arXiv 2410.09140).

    The body of the paper was not at hand, nor is there code: only its abstract and a digest with the two bounds on a
    neighbour, |x - e| <= D_1 and cos(x, e) in [S_1, S_2]. All other choices here, every default too, are this
    library's. Nothing that it gives is a reproduction of the paper.

    1. Neighbours N of the concept's rows e, and rows F far from them, are drawn (`placed`).
    2. Closed form, one map T of the token rows for all layers: W' = W T minimises, with e* the anchor's rows,
       sum over e and N |W' x - W e*|^2 + far_weight sum over F |W' y - W y|^2 + ridge |W' - W|^2 + captions.
    3. With the map in force a LoRA on the layers that read the text learns to predict for x what the unedited model
       predicts for e*, and for y what it predicts for y.

    tokens:       which rows of the name's prompt are e: its "last" token, or that and all after it ("last+rest").
    near, far:    how many neighbours, and how many rows far off, are drawn of each row.
    near_cosines: [S_1, S_2].  far_cosines: the same of F.
    near_distance: D_1. None: |e| sqrt(2 - 2 S_1), the largest distance that the cosines allow.
    far_weight:   lambda_1. In F are also all rows of the names in `retain` and of the empty prompt.
    ridge:        lambda_2.
    captions_weight: what the concepts' `retain_texts` count for, all of them together as this many captions.
    steps:        of the LoRA; 0: none, and the edit is the map alone.
    keep_weight:  of F in the LoRA's loss.
    rank, batch_size, learning_rate: of the LoRA; a step has batch_size rows of N and as many of F.
    sampling_steps, guidance: of the unedited model's samples on which the noise is compared; each stops before one of
                  the steps, drawn uniformly, and is asked for what its row says.

    A drawn row has the length of e and a cosine drawn uniformly; so it is where it should be by construction. Noise
    added to e would be nearly orthogonal to it, all of one length, and within both bounds only on a thin shell; and
    rows of the text encoder have nearly one length. Neighbours spread in all directions, and a linear map takes ALL
    directions towards the anchor as far as F, the captions and the ridge do not hold them: keep far * far_weight above
    near.

    An anchor defaults to the empty prompt.
    """

    tokens: Tokens = "last+rest"
    near: int = 10
    near_cosines: Range = (0.8, 1.0)  # S1, S2
    near_distance: float | None = None  # D1
    far: int = 100
    far_cosines: Range = (0.0, 0.5)
    far_weight: float = tunable(1.0, 0.01, 100.0, log=True)  # λ1
    ridge: float = tunable(0.5, 0.01, 100.0, log=True)  # λ2
    captions_weight: float = 1.0
    steps: int = tunable(100, 20, 500)
    keep_weight: float = tunable(1.0, 0.1, 100.0, log=True)
    rank: int = 4
    batch_size: int = 1
    learning_rate: float = tunable(1e-4, 1e-5, 1e-2, log=True)
    sampling_steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "far_weight", "ridge", "rank", "batch_size", "learning_rate", "sampling_steps")
        require_not_negative(self, "near", "far", "captions_weight", "steps", "keep_weight")
        cosines = [*self.far_cosines, *self.near_cosines]
        if cosines != sorted(cosines) or not -1 <= cosines[0] <= cosines[-1] <= 1:
            raise ValueError(
                f"Cosines lie in -1..1, smaller ones first, far ones below near ones; got {self.far_cosines} and "
                f"{self.near_cosines}."
            )
        if self.near_distance is not None and not 0 < self.near_distance < math.inf:
            raise ValueError("near_distance must be positive and finite, or None.")
        if not math.isfinite(self.guidance):
            raise ValueError("guidance must be finite.")

    def erase(
        self,
        model: DiffusionModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Edit:
        """The edit that erases the concepts: a map of the token rows and, with steps, a LoRA behind it.

        checkpoint: a folder for the training state; run the same call again after an interruption and it goes on where
                    it stopped, with the same result. One process only.
        Raises ValueError when there is no concept or one twice, when what is to be erased is retained or an anchor,
        when the tokenizer would cut a prompt, when no neighbour is as near as `near_distance` asks, when an edit is in
        force, or when the checkpoint belongs to another run.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        kept = [EMPTY, *((name, name) for name in all_names(concepts, "retain"))]
        pairs = [_phrases(c) for c in concepts]
        rows = TokenRows.of(model, [*(phrase for pair in pairs for phrase in pair), *kept])
        around = [self._surroundings(rows, pair, seed) for pair in pairs]
        held = self._held(model, concepts, around, torch.cat([*map(rows.block, kept)]))
        keys = WeightedRows.of(torch.cat([a.near.flatten(0, 1) for a in around]))
        shared = replacement(keys, torch.cat([a.goals for a in around]), WeightedRows.of_gram(held), self.ridge)
        record = provenance(self, concepts, seed)
        if not self.steps:
            return Edit(model.text_fingerprint, maps={"text": (shared,)}, provenance=(record,))
        names = rows.prompts.select([rows.place[prompt] for prompt, _ in kept])
        plan = self._plan(run_identity(record, concepts, model), seed, checkpoint)
        deltas = self._trained(model, _Asked(shared, around, names), plan)
        return Edit(model.fingerprint, maps={"text": (shared,)}, deltas=deltas, provenance=(record,))

    def _surroundings(self, rows: TokenRows, pair: tuple[Phrase, Phrase], seed: int) -> _Surroundings:
        """What lies around the first phrase, and the rows of the second."""
        mine, anchor = rows.aligned(pair, self.tokens)
        draw = torch.Generator().manual_seed(random.Random(f"{seed} {pair[0][1]}").getrandbits(63))
        near = placed(mine, self.near, nearest(mine, self.near_cosines, self.near_distance), self.near_cosines[1], draw)
        far = placed(mine, self.far, torch.full_like(mine[:, 0], self.far_cosines[0]), self.far_cosines[1], draw)
        prompts = rows.prompts.select([rows.place[prompt] for prompt, _ in pair])
        return _Surroundings(torch.cat([mine[None], near]), far, anchor, prompts, rows.last(pair[0]))

    def _held(
        self, model: DiffusionModel, concepts: Sequence[Concept], around: Sequence[_Surroundings], kept: Tensor
    ) -> Float[Tensor, "d d"]:
        """Weighted second moments of F and of the captions."""
        held = self.far_weight * gram(torch.cat([kept, *(a.far.flatten(0, 1) for a in around)]))
        captions = all_names(concepts, "retain_texts")
        return held + self.captions_weight * second_moments(model, captions) / max(len(captions), 1)

    def _plan(self, run: str, seed: int, checkpoint: str | Path | None) -> Plan:
        file = state_file(checkpoint)
        return Plan(self.steps, self.learning_rate, seed, run, checkpoint=file)

    def _trained(self, model: DiffusionModel, asked: _Asked, plan: Plan) -> dict[str, LowRank]:
        adapter = Adapter(self.rank, self.rank, 0.0, model.projections)
        accelerator = one_process(model.device, "RealEra")
        with inserted(model, adapter, plan.seed) as student:
            steps = _Steps(self, model, student, asked, plan.seed)
            train(student, steps.of, partial(_loss, model), plan, accelerator)
            return low_rank_deltas(student, adapter)


def _phrases(concept: Concept) -> tuple[Phrase, Phrase]:
    """The concept's name and its anchor, each as a prompt."""
    anchor = (concept.anchor or "").strip()
    return (concept.name, concept.name), (anchor, anchor) if anchor else EMPTY


# -- neighbours ------------------------------------------------------------------------------------------------------


def placed(
    rows: Float[Tensor, "n d"], count: int, low: Float[Tensor, " n"], high: float, draw: torch.Generator
) -> Float[Tensor, "count n d"]:
    """Rows of the same length, each at a cosine drawn uniformly from low .. high to its own, in a random direction."""
    lengths = rows.norm(dim=1, keepdim=True)
    along = rows / lengths
    noise = torch.randn(count, *rows.shape, generator=draw, dtype=rows.dtype).to(rows.device)
    share = torch.rand(count, len(rows), 1, generator=draw, dtype=rows.dtype).to(rows.device)
    across = noise - (noise * along).sum(-1, keepdim=True) * along
    cosine = low[:, None] + (high - low)[:, None] * share
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    return lengths * (cosine * along + sine * across / across.norm(dim=-1, keepdim=True))


def nearest(rows: Float[Tensor, "n d"], cosines: Range, distance: float | None) -> Float[Tensor, " n"]:
    """The smallest cosine of a neighbour of each row: S_1, or more where D_1 asks it.

    Points of the length of e at a cosine s from it are |e| sqrt(2 - 2 s) away. Raises ValueError when D_1 and S_2
    exclude each other.
    """
    low = torch.full_like(rows[:, 0], cosines[0])
    if distance is None:
        return low
    low = torch.maximum(low, 1 - distance**2 / (2 * rows.square().sum(1)))
    if float(low.max()) > cosines[1]:
        raise ValueError(
            f"A neighbour within near_distance {distance} has a cosine of at least {float(low.max()):.4f}; "
            f"near_cosines ends at {cosines[1]}."
        )
    return low


@dataclass(frozen=True, eq=False)
class _Surroundings:
    """A concept's rows and what was drawn around them.

    near: e and then N.  far: what of F was drawn.  anchor: e*.
    prompts: the concept's and the anchor's.  start: the place of the first of the rows in the concept's prompt.
    """

    near: Float[Tensor, "m n d"]
    far: Float[Tensor, "k n d"]
    anchor: Float[Tensor, "n d"]
    prompts: Prompts
    start: int

    @property
    def goals(self) -> Float[Tensor, "mn d"]:
        """For each row of `near` the row of the anchor."""
        return self.anchor.repeat(len(self.near), 1)

    def saying(self, rows: Float[Tensor, "n d"]) -> Prompts:
        """The concept's prompt with these rows for its own."""
        prompt = self.prompts.select([0])
        states = prompt.states.clone()
        states[0, self.start : self.start + len(rows)] = rows.to(states)
        return replace(prompt, states=states)


# -- the LoRA --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
    """The map in force, what may be asked for near the concepts and far from them, and the retained names."""

    shared: ConceptMap
    around: Sequence[_Surroundings]
    names: Prompts

    def near(self, draw: random.Random) -> tuple[Prompts, Prompts]:
        """A row of e or N in its prompt, and the anchor's prompt."""
        one = draw.choice(self.around)
        return one.saying(one.near[draw.randrange(len(one.near))]), one.prompts.select([1])

    def far(self, draw: random.Random) -> tuple[Prompts, Prompts]:
        """A prompt of F, twice."""
        number = draw.randrange(self._drawn + len(self.names))
        if number >= self._drawn:
            return (self.names.select([number - self._drawn]),) * 2
        one = self.around[number % len(self.around)]
        return (one.saying(one.far[number // len(self.around)]),) * 2

    @cached_property
    def _drawn(self) -> int:
        return sum(len(one.far) for one in self.around)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a step: latents, timesteps, prompts behind the map, the noise to predict, what each row counts for."""

    latents: Float[Tensor, "n c h w"]
    timesteps: Float[Tensor, " n"]
    prompts: Prompts
    target: Float[Tensor, "n c h w"]
    weights: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class _Steps:
    """The rows of a step: a function of its number. All that is learnt comes from the unedited model."""

    settings: RealEra
    model: DiffusionModel
    student: Any
    asked: _Asked
    seed: int

    @torch.no_grad()
    def of(self, step: int) -> list[_Rows]:
        s, draw = self.settings, random.Random(f"{self.seed} {step}")
        pairs = [self.asked.near(draw) for _ in range(s.batch_size)]
        pairs += [self.asked.far(draw) for _ in range(s.batch_size)]
        given, goals = (sum(rest, first) for first, *rest in zip(*pairs, strict=True))
        stops = [draw.randrange(s.sampling_steps) for _ in pairs]
        seeds = [draw.getrandbits(31) for _ in pairs]
        with self.student.disable_adapter(), evaluating(self.model.denoiser):
            latents, times = self.model.rollout(
                given, steps=s.sampling_steps, stop=stops, seeds=seeds, guidance=s.guidance
            )
            target = self.model.predict(latents, times, goals)
        weights = torch.tensor([1.0] * s.batch_size + [s.keep_weight] * s.batch_size, device=latents.device)
        mapped = replace(given, states=self.asked.shared(given.states))
        return [_Rows(latents, times, mapped, target, weights / s.batch_size)]


def _loss(model: DiffusionModel, _: nn.Module, rows: _Rows) -> Tensor:
    """The student is the model's own denoiser."""
    gap = model.predict(rows.latents, rows.timesteps, rows.prompts) - rows.target
    return (rows.weights * gap.square().mean((1, 2, 3))).sum()
