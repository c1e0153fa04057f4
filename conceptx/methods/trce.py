"""TRCE, Towards Reliable Malicious Concept Erasure (Chen et al. 2025, arXiv 2503.07389)."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from conceptx.concept import Concept
from conceptx.edit import Delta, Edit
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance, run_identity
from conceptx.geometry import ConceptMap, WeightedRows, replacement, steer
from conceptx.models import DiffusionModel, Prompts, evaluating
from conceptx.models.text_moments import second_moments
from conceptx.models.token_rows import TokenRows
from conceptx.models.weights import Student, in_float32, weights_in_place
from conceptx.progress import report
from conceptx.settings import require_not_negative, require_positive, require_templates, tunable
from conceptx.train.loop import Plan, state_file, train
from conceptx.train.processes import one_process
from conceptx.words import whole_words

Pair = tuple[str, str]  # a prompt of the concept and the safe prompt in its place
Draw = tuple[int, int, int]  # a latent: number of the prompt, of the trajectory, of the step that it stops before
TEMPLATES = ("{}", "a photo of {}", "an image of {}", "an image depicting {}", "a picture of {}", "a painting of {}")
TRAINED = r"\.attn1\.|\.attn2\.to_q\."
AT_ONCE = 64  # trajectories walked together


@dataclass(frozen=True)
class TRCE(Eraser):
    """Map the end-of-text rows of a concept's prompts to safe ones, then steer the early denoising (arXiv 2503.07389).

    Stage 1 is a closed form (§ "Textual semantic erasure"): with m the end-of-text row of a prompt, s that of its safe
    prompt and k all rows of the prompts that are kept, W' minimises

        mean |W' m - W s|^2 + retain_weight mean_of_prompts sum |W' k - W k|^2 + ridge |W' - W|^2

    for every projection W of keys and values at once: a map of the text side. The end-of-text row carries what the
    whole prompt means; the rows of its words stay, so the context does.

    Stage 2 (§ "Denoising trajectory steering") trains the self-attention and the queries of the cross-attention on
    latents z of the original model asked for the concept, early in the sampling. With e its noise and g = push,
    f_safe = e_s + g (e_s - e_0) and f_unsafe = e_m + g (e_m - e_0), the loss is

        max(0, |n - f_safe|^2 - |n - f_unsafe|^2 + margin), means over a latent,

    for the noise n that the edited model predicts at z, asked for the concept and asked for nothing, and then
    keep_weight times the squared distance to the model of stage 1 without a prompt, on latents drawn without one.

    templates:     prompt forms of each name and synonym; the anchor, the safe phrase, takes the same form.
    retain_weight: eta; the square of the authors' "preserve scale" (0.01 for sexual, 0.02 for unsafe content).
    ridge:         toward no change; published 0, which needs a prior of full rank.
    steps:         of stage 2. 0: stage 1 alone, a map that fits every pipeline with these text encoders.
    batch_size, keep_batch: latents of the concept and without a prompt in each step.
    learning_rate: of AdamW.
    sampling_steps, guidance: of the trajectories that the latents come from (DDIM).
    early:         the share of the sampling steps that latents of the concept come from.
    trajectories, unconditional: how many there are for each prompt, and without one.
    push:          g.
    margin, keep_weight: of the loss.

    Asked about are the names and synonyms in every template, and the concept's `prompts` as they are (there the safe
    prompt has the anchor in the name's place). Without an anchor the safe prompt is empty. Kept are all rows of the
    empty prompt, of `retain` and of `retain_texts` (published: 30,000 captions of COCO).

    Differs from the authors' code: the end-of-text row is where the tokenizer puts it (theirs counts words, and hits a
    content token when a word has several tokens); gradients are zeroed at each step (theirs add up over all updates);
    a latent has the noise level of its timestep, in the keep loss too (theirs is a step cleaner, there with a random
    timestep beside it). Only the row that their weight vector (0, 1, 0, 0) leaves is used. Their 15 templates and lists
    of phrases are not shipped; both stages ask the same prompts (theirs: the second one template). The ridge is not 0,
    so that a few retained names are enough. Each step draws its latents, where theirs go three times through the
    trajectories; of each trajectory only what the steps will use is computed and stored. Their constant in the keep
    loss has no gradient and is left out.
    """

    templates: tuple[str, ...] = TEMPLATES
    retain_weight: float = tunable(1e-4, 1e-6, 1.0, log=True)  # η
    ridge: float = 1e-6
    steps: int = tunable(300, 50, 600)
    batch_size: int = 1
    keep_batch: int = 4
    learning_rate: float = tunable(1e-6, 1e-7, 1e-3, log=True)
    sampling_steps: int = 50
    guidance: float = 3.0
    early: float = 0.5
    trajectories: int = 5
    unconditional: int = 2000
    push: float = tunable(15.0, 1.0, 50.0, log=True)  # g
    margin: float = 0.01
    keep_weight: float = tunable(100.0, 1.0, 1000.0, log=True)

    def __post_init__(self) -> None:
        counts = ("batch_size", "keep_batch", "sampling_steps", "trajectories", "unconditional")
        require_positive(self, *counts, "retain_weight", "ridge", "learning_rate")
        require_not_negative(self, "steps", "margin", "keep_weight")
        if not (math.isfinite(self.push) and math.isfinite(self.guidance)):
            raise ValueError("push and guidance must be finite.")
        if not 0 <= self.early <= 1:
            raise ValueError(f"early is a share of the sampling steps, in 0..1, got {self.early}.")
        require_templates(self.templates)

    def erase(
        self,
        model: DiffusionModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Edit:
        """The edit that erases all the concepts: a map of the token rows and, with steps, dense changes of weights.

        Weights in half precision are trained in float32. The model stays as it is.
        checkpoint: a folder for the training state; run the same call again after an interruption and it goes on where
                    it stopped, with the same result. One process only.

        Raises ValueError when the rows that the denoiser reads are not CLIP's, when there are steps and the denoiser
        has no such attention, when there is no concept or one twice, when what is to be erased is retained or an
        anchor, when the tokenizer would cut a prompt, when an edit is in force on the model, when several processes
        call it, or when the checkpoint belongs to another run.
        """
        self._accept(model)
        _require_clip(model)
        names = chosen(model) if self.steps else []
        concepts = as_concepts(concept)
        check_roles(concepts)
        pairs = list(dict.fromkeys(pair for c in concepts for pair in self._pairs(c)))
        record = provenance(self, concepts, seed, prompts=len(pairs))
        shared = self._shared(model, pairs, all_names(concepts, "retain", "retain_texts"))
        maps = {"text": (shared,)}
        if not self.steps:
            return Edit(model.text_fingerprint, maps=maps, provenance=(record,))
        plan = self._plan(run_identity(record, concepts, model), seed, checkpoint)
        asked = _Asked.of(model, pairs, shared)
        deltas = self._trained(model, names, asked, plan)
        return Edit(model.fingerprint, maps=maps, deltas=deltas, provenance=(record,))

    def _pairs(self, concept: Concept) -> Iterable[Pair]:
        """(prompt, safe prompt) of one concept."""
        anchor, names = (concept.anchor or "").strip(), (concept.name, *concept.synonyms)
        for name in names:
            for template in self.templates:
                yield template.format(name), template.format(anchor) if anchor else ""
        for prompt in concept.prompts:
            yield prompt, _without(prompt, names, anchor) if anchor else ""

    def _shared(self, model: DiffusionModel, pairs: Sequence[Pair], kept: Sequence[str]) -> ConceptMap:
        """Stage 1."""
        unsafe, safe = ([(pair[side], "") for pair in pairs] for side in (0, 1))  # "": the row is the end-of-text token
        encoded = TokenRows.of(model, [*unsafe, *safe], trimmed=True)
        keys = WeightedRows.of(encoded.last_rows(unsafe), 1 / len(pairs))
        prior = second_moments(model, ["", *kept]) / (1 + len(kept))
        retained = WeightedRows.of_gram(prior, self.retain_weight)
        return replacement(keys, encoded.last_rows(safe), retained, self.ridge)

    def _trained(self, model: DiffusionModel, names: Sequence[str], asked: _Asked, plan: Plan) -> Mapping[str, Delta]:
        """Stage 2."""
        accelerator = one_process(model.device, "TRCE")
        draws = _Draws(self, asked.count, plan.seed)
        latents = stored(model, asked.plain, draws)
        with (
            in_float32(model.denoiser),
            weights_in_place(model.denoiser, names, f"{model.denoiser_name}.") as student,
        ):
            steps = _Steps(self, model, student, asked, draws, latents)
            train(student.module, steps.of, partial(_loss, model), plan, accelerator)
            return student.deltas()

    def _plan(self, run: str, seed: int, checkpoint: str | Path | None) -> Plan:
        return Plan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=seed,
            run=run,
            gradient_clip=0.0,
            checkpoint=state_file(checkpoint),
        )


def chosen(model: DiffusionModel) -> list[str]:
    """Names, inside the denoiser, of what stage 2 trains: all of the self-attention, the queries of the other.

    Raises ValueError when the denoiser has none.
    """
    names = [name for name, _ in model.denoiser.named_parameters() if re.search(TRAINED, name)]
    if not names:
        kind = type(model.denoiser).__name__
        raise ValueError(f"TRCE trains attn1 and attn2.to_q of a U-Net, {kind} has none; steps=0 leaves that out.")
    return names


def _require_clip(model: DiffusionModel) -> None:
    reader = model.architecture.tokenizer.replace("tokenizer", "text_encoder")
    kind = type(getattr(model.pipeline, reader)).__name__
    if not kind.startswith("CLIPText"):
        raise ValueError(f"TRCE maps the end-of-text row of CLIP, this denoiser reads the rows of a {kind}.")


def _without(prompt: str, names: Sequence[str], anchor: str) -> str:
    """The prompt with the anchor for every name in it; the anchor alone where it holds none."""
    changed, count = whole_words(*names).subn(lambda _: anchor, prompt)
    return changed if count else anchor


# -- stage 2: prompts and latents ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
    """`count` prompts, then as many safe ones, then no prompt; plain, and as the map of stage 1 leaves them."""

    plain: Prompts
    mapped: Prompts
    count: int

    @staticmethod
    def of(model: DiffusionModel, pairs: Sequence[Pair], shared: ConceptMap) -> _Asked:
        texts = [text for side in zip(*pairs, strict=True) for text in side]
        plain = model.encode(texts) + model.unconditional()
        return _Asked(plain, replace(plain, states=shared(plain.states)), len(pairs))


@dataclass(frozen=True)
class _Draws:
    """Which latents a step learns from, a function of its number. The prompt 2 * count is no prompt."""

    settings: TRCE
    count: int
    seed: int

    def of(self, step: int) -> tuple[list[Draw], list[Draw]]:
        """Those of the concept, and those to keep."""
        s, draw = self.settings, random.Random(f"{self.seed} {step}")
        stops = min(int(s.early * s.sampling_steps) + 1, s.sampling_steps)
        concept = [
            (draw.randrange(self.count), draw.randrange(s.trajectories), draw.randrange(stops))
            for _ in range(s.batch_size)
        ]
        keep = [
            (2 * self.count, draw.randrange(s.unconditional), draw.randrange(s.sampling_steps))
            for _ in range(s.keep_batch)
        ]
        return concept, keep

    def needed(self) -> dict[tuple[int, int], set[int]]:
        """(prompt, trajectory) -> the stops that some step of the run uses; the longest ways first."""
        ways: dict[tuple[int, int], set[int]] = {}
        for step in range(self.settings.steps):
            for prompt, number, stop in chain(*self.of(step)):
                ways.setdefault((prompt, number), set()).add(stop)
        return dict(sorted(ways.items(), key=lambda way: (-max(way[1]), way[0])))

    def noise_seed(self, prompt: int, number: int) -> int:
        return random.Random(f"{self.seed} trajectory {prompt} {number}").getrandbits(31)


Latents = Mapping[Draw, tuple[Tensor, Tensor]]  # (c, h, w) and its timestep


@torch.no_grad()
def stored(model: DiffusionModel, prompts: Prompts, draws: _Draws) -> Latents:
    """All latents that a run will learn from, on the CPU: each trajectory is walked once, to its last stop in use."""
    ways, empty, done = draws.needed(), len(prompts) - 1, 0
    found: dict[Draw, tuple[Tensor, Tensor]] = {}
    for kind, guidance in ((False, draws.settings.guidance), (True, 1.0)):
        mine = [way for way in ways if (way[0] == empty) == kind]
        for start in range(0, len(mine), AT_ONCE):
            batch = mine[start : start + AT_ONCE]
            found.update(_walked(model, prompts, draws, {way: ways[way] for way in batch}, guidance))
            done += len(batch)
            report("trajectories", done, len(ways))
    return found


def _walked(
    model: DiffusionModel,
    prompts: Prompts,
    draws: _Draws,
    ways: Mapping[tuple[int, int], set[int]],
    guidance: float,
) -> Latents:
    """The latents at the stops of some trajectories, which go along together."""
    seeds = [draws.noise_seed(*way) for way in ways]
    walk = model.walk(
        prompts.select([prompt for prompt, _ in ways]),
        steps=draws.settings.sampling_steps,
        seeds=seeds,
        guidance=guidance,
    )
    last, found = max(map(max, ways.values())), {}
    for stop, (latents, timestep) in zip(range(last + 1), walk, strict=False):
        for row, (way, stops) in enumerate(ways.items()):
            if stop in stops:
                found[(*way, stop)] = (latents[row].cpu(), timestep.cpu())
    return found


# -- stage 2: steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Contrast:
    """Latents of the concept (n, c, h, w), what is asked at them, and the two noises to be near to and far from."""

    latents: Tensor
    timesteps: Tensor
    prompts: Prompts
    safe: Tensor
    unsafe: Tensor
    margin: float

    def loss(self, noise: Tensor) -> Tensor:
        return contrast(noise, self.safe, self.unsafe, self.margin).mean()


@dataclass(frozen=True, eq=False)
class _Keep:
    """Latents without a prompt, and what the model of stage 1 predicts there."""

    latents: Tensor
    timesteps: Tensor
    prompts: Prompts
    target: Tensor
    weight: float

    def loss(self, noise: Tensor) -> Tensor:
        return self.weight * (noise - self.target).square().mean()


def contrast(noise: Tensor, safe: Tensor, unsafe: Tensor, margin: float) -> Tensor:
    """max(0, |noise - safe|^2 - |noise - unsafe|^2 + margin) (n,) of noises (n, c, h, w), means over each."""
    near, far = ((noise - goal).square().flatten(1).mean(1) for goal in (safe, unsafe))
    return (near - far + margin).relu()


@dataclass(frozen=True)
class _Steps:
    """The two parts of a step: a function of its number alone."""

    settings: TRCE
    model: DiffusionModel
    student: Student
    asked: _Asked
    draws: _Draws
    latents: Latents

    @torch.no_grad()
    def of(self, step: int) -> list[_Contrast | _Keep]:
        concept, keep = self.draws.of(step)
        with self.student.teacher(), evaluating(self.model.denoiser):
            return [self._contrast(concept), self._keep(keep)]

    def _contrast(self, draws: Sequence[Draw]) -> _Contrast:
        """The targets are the original model's, which reads the prompts as they are."""
        s, n = self.settings, self.asked.count
        (x, t), rows = self._at(draws), [prompt for prompt, *_ in draws]
        empty, safe = [2 * n] * len(rows), [row + n for row in rows]
        plain = self.asked.plain.select([*empty, *rows, *safe])
        e0, em, es = self.model.predict(x.repeat(3, 1, 1, 1), t.repeat(3), plain).chunk(3)
        f_safe, f_unsafe = (steer(e, e0, [e], [s.push]).repeat(2, 1, 1, 1) for e in (es, em))
        asked = self.asked.mapped.select([*rows, *empty])
        return _Contrast(x.repeat(2, 1, 1, 1), t.repeat(2), asked, f_safe, f_unsafe, s.margin)

    def _keep(self, draws: Sequence[Draw]) -> _Keep:
        x, t = self._at(draws)
        prompts = self.asked.mapped.select([prompt for prompt, *_ in draws])
        return _Keep(x, t, prompts, self.model.predict(x, t, prompts), self.settings.keep_weight)

    def _at(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        latents, timesteps = zip(*(self.latents[draw] for draw in draws), strict=True)
        return torch.stack(latents).to(self.model.device), torch.stack(timesteps).to(self.model.device)


def _loss(model: DiffusionModel, _: nn.Module, part: _Contrast | _Keep) -> Tensor:
    """The student is the model's own denoiser."""
    return part.loss(model.predict(part.latents, part.timesteps, part.prompts))
