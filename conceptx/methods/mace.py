"""MACE, Mass Concept Erasure (Lu, Wang, Li, Liu, Kong 2024, arXiv 2403.06135)."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from conceptx.concept import Concept, pictures
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance, run_identity
from conceptx.geometry import ConceptMap, DenseMetric, capped
from conceptx.geometry.arrays import gram, to_working
from conceptx.models import DiffusionModel, Prompts
from conceptx.models.adapters import Adapter, inserted, low_rank_deltas
from conceptx.models.attention_maps import captured, cross_attentions
from conceptx.models.text_moments import second_moments
from conceptx.progress import track
from conceptx.settings import require_choices, require_not_negative, require_positive, require_templates, tunable
from conceptx.store import load_tensors, save_tensors
from conceptx.train.loop import Plan, train
from conceptx.train.processes import one_process

Tokens = Literal["name", "name+end"]
Deltas = Mapping[str, LowRank]

OBJECT_TEMPLATES = (
    "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}", "a drawing of {}", "a sketch of {}",
    "a close view of {}", "a distant view of {}", "a portrait of {}", "a poster with {}", "a postcard of {}",
    "an old photograph of {}", "a blurred photo of {}", "a bright photo of {}", "a dark photo of {}",
    "{} in the morning", "{} at night", "{} in the rain", "{} under a blue sky", "{} on a white background",
    "{} beside a window", "{} in a garden", "{} in a crowded street", "{} near the sea", "{} seen from above",
    "two people look at {}", "a child points at {}", "a stamp that shows {}", "{} in black and white", "this is {}",
)  # fmt: skip
STYLE_TEMPLATES = (
    "a picture in the style of {}", "a painting in the style of {}", "a drawing in the style of {}",
    "a landscape in the style of {}", "a portrait in the style of {}", "a still life in the style of {}",
    "a city in the style of {}", "a village in the style of {}", "a garden in the style of {}",
    "a forest in the style of {}", "the sea in the style of {}", "a mountain in the style of {}",
    "a bridge in the style of {}", "a house in the style of {}", "a room in the style of {}",
    "a table in the style of {}", "a flower in the style of {}", "a tree in the style of {}",
    "a dog in the style of {}", "a horse in the style of {}", "a bird in the style of {}",
    "a child in the style of {}", "a crowd in the style of {}", "a night sky in the style of {}",
    "a painting by {}", "a sketch by {}", "a poster by {}", "a famous work by {}", "{}, a winter scene",
    "{}, a summer day",
)  # fmt: skip
# What a concept without an anchor is read as: a super-category.
GENERIC = {"person": "a person", "character": "a person", "style": "art"}


@dataclass(frozen=True)
class MACE(Eraser):
    """Refine what other words know of the concepts, unlearn where the model looks for each, fuse (arXiv 2403.06135).

    1. Closed form (eqs. 1, 2): in prompts with the concept, the rows of all OTHER tokens are read as the rows of the
       same prompts with the anchor. This is one map T of the token rows, shared by all layers: W' = W T.
    2. For each concept by itself, a LoRA on keys and values on top of W' (eq. 3): little attention on the concept's
       tokens where the pictures show it, at late timesteps (eq. 5).
    3. Closed form (eqs. 5 to 7 of the fusion): one W* gives, on each concept's prompts, what W' and its LoRA give.

    templates: prompt forms, {} for the name or the anchor; the first also asks for pictures. (): built-in ones, of
               styles or of everything else (the authors' 31 and 30 are not shipped).
    ridge:     weight of |W' - W|^2 in stage 1 and of |W* - W'|^2 in stage 3.
    refine_captions, fuse_captions: lambda_1 and lambda_2, what the concepts' `retain_texts` count for in stages 1 and
               3: all of them together as this many captions, each with all its rows.
    refine_names, fuse_names: what each of the names in `retain` counts for, with all its rows.
    tokens:    on what attention is unlearnt. "name": the concept's tokens. "name+end" (the authors' `use_pooler`): also
               the end-of-text token and the padding where that is the same token, which then dominates.
    squared:   the sum over layers of the squared Frobenius norm (eq. 3), or of the norm itself (the authors' code).
    timesteps, sharpness: t1, t2 and gamma; timesteps are drawn by s(gamma (t - t1)) - s(gamma (t - t2)), s the
               sigmoid. None: all alike (the authors' recipe for explicit content).
    images, sampling_steps, guidance: how many pictures the model itself draws of a concept that brings no `images`, and
               how. Only `images` of the concept can have `masks`; where there are none, the whole picture counts.
    rank, steps, learning_rate: of each LoRA; one picture, one prompt and one timestep a step.

    An anchor defaults to "a person" for persons and characters, "art" for styles, "a thing" otherwise.

    Defaults are the authors' settings for ten celebrities, but for the ridge, which is 0 there (and between 10 and
    1,000 for objects). Different from the authors' code: the four weights are the effective ones, relative to the
    corpus. The code sums the unnormalised moments of some 617,000 captions with weight 1e-4, in stage 1 by mistake
    twice: 0.006 captions in stage 1 and 62 in stage 3; likewise 8e4 * 1e-8 and 8e4 * 1e-4 for names. The ridge must be
    positive, as nothing else keeps the sums invertible without a corpus. Concepts are summed one after another, so any
    number fits in memory and none is skipped (their memory-saving path drops most). The sums are in float64 and serve
    all layers. A latent is the mean of the VAE's encoding of a picture scaled to [-1, 1] (theirs: normalised as for
    ImageNet). Pictures and masks are not made by a segmentation model here.
    """

    templates: tuple[str, ...] = ()
    ridge: float = tunable(100.0, 1.0, 10_000.0, log=True)
    refine_captions: float = tunable(0.006, 1e-4, 1.0, log=True)  # λ1, of all captions
    refine_names: float = 8e-4
    fuse_captions: float = 62.0  # λ2
    fuse_names: float = 8.0
    tokens: Tokens = "name"
    squared: bool = True
    timesteps: tuple[float, float] | None = (200.0, 400.0)  # t1, t2
    sharpness: float = 0.05  # γ
    images: int = 8
    sampling_steps: int = 30
    guidance: float = 7.5
    rank: int = 1
    steps: int = tunable(50, 10, 200)
    learning_rate: float = tunable(1e-4, 1e-5, 1e-2, log=True)

    def __post_init__(self) -> None:
        require_choices(self)
        if self.templates:
            require_templates(self.templates)
        require_positive(self, "ridge", "sharpness", "images", "sampling_steps", "rank", "steps", "learning_rate")
        require_not_negative(self, "refine_captions", "refine_names", "fuse_captions", "fuse_names")
        if not math.isfinite(self.guidance):
            raise ValueError("guidance must be finite.")
        if self.timesteps is not None and not self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"The first of the timesteps must be the smaller one, got {self.timesteps}.")

    def erase(
        self,
        model: DiffusionModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Edit:
        """The edit of all keys and values that erases the concepts together; the model stays as it is.

        checkpoint: a folder for the trained LoRAs; run the same call again after an interruption and the concepts that
                    are done are not trained again, with the same result. One process only.
        Raises ValueError when there is no concept or one twice, when what is to be erased is retained or an anchor,
        when the tokenizer would cut a prompt, when a picture cannot be read, when the denoiser has no cross-attention
        (SD 3, FLUX), when an edit is in force, or when the checkpoint belongs to another run.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        cross_attentions(model)
        shown = [_pictures_read(c) for c in concepts if c.images]
        tasks = [_Task.of(c, self.templates) for c in concepts]
        prior = _Prior.of(model, concepts)
        refined = refinement(_pairs(model, tasks), prior.sum(self.refine_captions, self.refine_names), self.ridge)
        record = provenance(self, concepts, seed)
        trainer = _Trainer(self, model, refined, seed, run_identity({**record, "pictures": shown}, concepts, model))
        folder = None if checkpoint is None else Path(checkpoint)
        fusion = Fusion(refined, self.ridge, prior.sum(self.fuse_captions, self.fuse_names))
        for number, task in enumerate(track(tasks, "concepts")):
            prompts = model.encode(task.prompts)
            file = None if folder is None else folder / f"{number:03}.safetensors"
            fusion.add(_flat(prompts), trainer.deltas(task, prompts, file))
        return Edit(model.fingerprint, deltas=fusion.deltas(model), provenance=(record,))


# -- the prompts of a concept, and what is retained ----------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A concept, its prompts, and the same prompts with the anchor for the name."""

    concept: Concept
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]

    @staticmethod
    def of(concept: Concept, templates: tuple[str, ...]) -> _Task:
        forms = templates or (STYLE_TEMPLATES if concept.kind == "style" else OBJECT_TEMPLATES)
        anchor = (concept.anchor or "").strip() or GENERIC.get(concept.kind, "a thing")
        prompts, anchors = (tuple(form.format(name) for form in forms) for name in (concept.name, anchor))
        return _Task(concept, prompts, anchors)


@dataclass(frozen=True, eq=False)
class _Prior:
    """Second moments of all rows of what is retained: of the mean caption, and summed over names."""

    captions: Float[Tensor, "d d"]
    names: Float[Tensor, "d d"]

    @staticmethod
    def of(model: DiffusionModel, concepts: Sequence[Concept]) -> _Prior:
        captions, names = all_names(concepts, "retain_texts"), all_names(concepts, "retain")
        return _Prior(second_moments(model, captions) / max(len(captions), 1), second_moments(model, names))

    def sum(self, captions: float, names: float) -> Tensor:
        return captions * self.captions + names * self.names


def _flat(prompts: Prompts) -> Float[Tensor, "rows d"]:
    return to_working(prompts.states).flatten(0, 1)


def _identity(like: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _pictures_read(concept: Concept) -> str:
    """A hash of the concept's picture files, all of which can be read."""
    pictures(concept)
    return hashlib.sha256(b"".join(Path(n).read_bytes() for n in (*concept.images, *concept.masks))).hexdigest()


# -- stage 1: what other words know --------------------------------------------------------------------------------


def refinement(
    pairs: Iterable[tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]], prior: Float[Tensor, "d d"], ridge: float
) -> Float[Tensor, "d d"]:
    """X with W' = W (I + X) for every W at once: eq. 2 with a ridge. pairs: (rows e_f, rows e_g), as they come."""
    held = prior + ridge * _identity(prior)
    moved = torch.zeros_like(held)
    for old, new in pairs:
        held += gram(old)
        moved += (new - old).T @ old
    return DenseMetric(held).solve(moved.T).T


def _pairs(model: DiffusionModel, tasks: Sequence[_Task]) -> Iterator[tuple[Tensor, Tensor]]:
    """(e_f, e_g) of each concept. Anchors that many concepts share are encoded once where they follow one another."""
    anchors = lru_cache(maxsize=1)(model.encode)
    for task in track(tasks, "refinement"):
        yield aligned_rows(model, model.encode(task.prompts), anchors(task.anchors))


def aligned_rows(model: DiffusionModel, first: Prompts, second: Prompts) -> tuple[Tensor, Tensor]:
    """The rows (n, d) of the first prompts that have a counterpart in the second ones, and these counterparts."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, texts in enumerate(zip(first.texts, second.texts, strict=True)):
        ids = [model.token_ids(text) for text in texts]
        places = aligned(ids[0], ids[1], first.states.shape[1])
        for side, prompts, rows in zip(found, (first, second), places, strict=True):
            side.append(to_working(prompts.states[number, rows]))
    return torch.cat(found[0]), torch.cat(found[1])


def aligned(first: Sequence[int], second: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """Places of the tokens that two prompts share: their common beginning, their common end, and the padding after it.

    first, second: token ids with the special ones, not padded; length: of the padded row. The longer padding is cut.
    """
    shorter = min(len(first), len(second))
    prefix = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    rest = shorter - prefix
    suffix = next((i for i in range(rest) if first[-1 - i] != second[-1 - i]), rest)
    starts = len(first) - suffix, len(second) - suffix
    tail = length - max(starts)
    beginning = list(range(prefix))
    return beginning + list(range(starts[0], starts[0] + tail)), beginning + list(range(starts[1], starts[1] + tail))


# -- stage 2: where the model looks --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Trainer:
    """Trains the LoRA of one concept after another, each on the refined weights."""

    settings: MACE
    model: DiffusionModel
    refined: Float[Tensor, "d d"]  # X of stage 1
    seed: int
    run: str

    def deltas(self, task: _Task, prompts: Prompts, file: Path | None) -> Deltas:
        """b a of every projection: from the file of an earlier call, or trained and written there."""
        if file is not None and file.is_file():
            return _load(file, self.run)
        deltas = self._trained(task, prompts)
        if file is not None:
            tensors = {f"{name}:{part}": t for name, delta in deltas.items() for part, t in delta.tensors().items()}
            save_tensors(file, {"run": _letters(self.run), **tensors})
        return deltas

    def _trained(self, task: _Task, prompts: Prompts) -> Deltas:
        s, model, key = self.settings, self.model, f"{self.seed} {task.concept.name}"
        adapter = Adapter(s.rank, s.rank, 0.0, model.projections)
        plan = Plan(s.steps, s.learning_rate, self.seed, self.run, what=f"attention on {task.concept.name}")
        accelerator = one_process(model.device, "MACE")
        steps = _Steps(s, model, self._scenes(task, prompts, key), key)
        with self._refined().applied(model), inserted(model, adapter, random.Random(key).getrandbits(31)) as student:
            train(student, steps.of, partial(_loss, model, s.squared), plan, accelerator)
            return low_rank_deltas(student, adapter)

    def _refined(self) -> Edit:
        """W' in the place of W, so that a LoRA beside it reads the rows themselves."""
        change = ConceptMap(self.refined, _identity(self.refined), torch.zeros_like(self.refined[0]))
        return Edit(self.model.fingerprint, maps={"text": (change,)}).fold(self.model)

    def _scenes(self, task: _Task, prompts: Prompts, key: str) -> _Scenes:
        """The concept's pictures, or some that the unedited model draws."""
        s, model = self.settings, self.model
        if task.concept.images:
            images, masks = pictures(task.concept)
        else:
            seeds = [random.Random(f"{key} picture {number}").getrandbits(31) for number in range(s.images)]
            asked = [task.prompts[0]] * s.images
            images = model.generate(asked, seeds=seeds, steps=s.sampling_steps, guidance=s.guidance)
            masks = torch.ones_like(images[:, :1])
        size = [side * model.pipeline.vae_scale_factor for side in model.latent_shape[1:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        tokens = [suppressed_rows(model, text, task.concept.name, s.tokens) for text in task.prompts]
        return _Scenes(prompts, tokens, model.to_latents(images), masks.to(model.device))


def suppressed_rows(model: DiffusionModel, prompt: str, name: str, tokens: Tokens) -> list[int]:
    """The places of the name in the prompt, and perhaps of the end-of-text tokens."""
    last = model.subject_end(prompt, name)
    rows = list(range(last + 3 - len(model.token_ids(name)), last + 1))
    if tokens == "name":
        return rows
    tokenizer = getattr(model.pipeline, model.architecture.tokenizer)
    end = len(model.token_ids(prompt)) - 1
    padding = tokenizer.pad_token_id == tokenizer.eos_token_id
    return rows + list(range(end, tokenizer.model_max_length if padding else end + 1))


def timestep_weights(count: int, between: tuple[float, float] | None, sharpness: float) -> Float[Tensor, " count"]:
    """The density (eq. 5) of the timesteps 0 .. count - 1, up to a factor."""
    times = torch.arange(count, dtype=torch.float64)
    if between is None:
        return torch.ones_like(times)
    low, high = (torch.sigmoid(sharpness * (times - edge)) for edge in between)
    return low - high


@dataclass(frozen=True, eq=False)
class _Scenes:
    """A concept's prompts and the places in each on which attention is unlearnt; its latents and their masks."""

    prompts: Prompts
    tokens: Sequence[list[int]]
    latents: Float[Tensor, "m c h w"]
    masks: Float[Tensor, "m 1 height width"]


@dataclass(frozen=True, eq=False)
class _Part:
    """One noisy picture, one prompt."""

    latents: Float[Tensor, "1 c h w"]
    timestep: Tensor
    prompt: Prompts
    tokens: list[int]
    mask: Float[Tensor, "1 1 height width"]


@dataclass(frozen=True, eq=False)
class _Steps:
    """The picture, prompt, timestep and noise of a step: a function of its number."""

    settings: MACE
    model: DiffusionModel
    scenes: _Scenes
    key: str

    def of(self, step: int) -> list[_Part]:
        s, scenes, draw = self.settings, self.scenes, random.Random(f"{self.key} {step}")
        picture, prompt = draw.randrange(len(scenes.latents)), draw.randrange(len(scenes.prompts))
        count = self.model.schedule.config["num_train_timesteps"]
        weights = timestep_weights(count, s.timesteps, s.sharpness).tolist()
        (timestep,) = draw.choices(range(count), weights)
        times = torch.tensor([timestep], device=self.model.device)
        signal, spread = self.model.schedule.level(times)
        latents = signal * scenes.latents[[picture]] + spread * self.model.noise([draw.getrandbits(31)])
        return [_Part(latents, times, scenes.prompts.select([prompt]), scenes.tokens[prompt], scenes.masks[[picture]])]


def _loss(model: DiffusionModel, squared: bool, _: nn.Module, part: _Part) -> Tensor:
    """The student is the model's own denoiser."""
    with captured(model) as maps:
        model.predict(part.latents, part.timestep, part.prompt)
    height, width = part.latents.shape[2:]
    masks = [inside(part.mask, (height, width), found.shape[2]) for found in maps.values()]
    losses = [looks(found, part.tokens, mask, squared) for found, mask in zip(maps.values(), masks, strict=True)]
    return torch.stack(losses).sum()


def looks(maps: Float[Tensor, "1 heads pixels tokens"], tokens: list[int], mask: Tensor, squared: bool) -> Tensor:
    """How much one layer looks at the tokens where the mask (pixels,) is true: the Frobenius norm, or its square."""
    chosen = maps[0, :, mask][..., tokens].float()
    return chosen.square().sum() if squared else torch.linalg.vector_norm(chosen)


def inside(mask: Float[Tensor, "1 1 height width"], sides: tuple[int, int], pixels: int) -> Tensor:
    """The mask (pixels,) as a layer sees it that has so many pixels of latents of these sides; nearest neighbour."""
    factor = math.sqrt(sides[0] * sides[1] / pixels)
    size = [round(side / factor) for side in sides]
    return F.interpolate(mask, size, mode="nearest")[0, 0].flatten() > 0.5


# -- stage 3: one change out of many --------------------------------------------------------------------------------


@dataclass(eq=False)
class Fusion:
    """W* = W (I + X) + sum_i b_i a_i K_i M^-1 for every projection at once, concept after concept.

    K_i = E_i'E_i over the rows of concept i, M = sum_i K_i + prior + ridge I. The retained rows keep what the ORIGINAL
    W makes of them, the ridge pulls to W' = W (I + X_1): X = X_1 (sum_i K_i + ridge I) M^-1. No layer has sums of its
    own.

    refined: X_1.  prior: lambda_2 P.
    """

    refined: Float[Tensor, "d d"]
    ridge: float
    prior: Float[Tensor, "d d"]
    pulled: Float[Tensor, "d d"] = field(init=False)  # sum of K_i, and the ridge
    ups: dict[str, list[Tensor]] = field(default_factory=dict)  # b_i
    downs: dict[str, list[Tensor]] = field(default_factory=dict)  # a_i K_i

    def __post_init__(self) -> None:
        self.pulled = self.ridge * _identity(self.prior)

    def add(self, rows: Float[Tensor, "n d"], deltas: Deltas) -> None:
        """A concept: all rows of its prompts, and its LoRA on each projection."""
        moments = gram(rows)
        self.pulled += moments
        for name, delta in deltas.items():
            self.ups.setdefault(name, []).append(delta.up)
            self.downs.setdefault(name, []).append(delta.down.to(moments) @ moments)

    def deltas(self, model: DiffusionModel) -> dict[str, LowRank]:
        """W* - W of every projection."""
        downs = {name: torch.cat(found) for name, found in self.downs.items()}
        right = torch.cat([self.refined @ self.pulled, *downs.values()])
        solved = DenseMetric(self.pulled + self.prior).solve(right.T).T
        change, *parts = solved.split([len(self.refined), *map(len, downs.values())])
        return {name: self._delta(model, name, change, part) for name, part in zip(downs, parts, strict=True)}

    def _delta(self, model: DiffusionModel, name: str, change: Tensor, downs: Tensor) -> LowRank:
        """W X + b a K M^-1, in the weight's own precision and at least float32."""
        weight = model.parameter(name)
        assert weight is not None  # only biases may be absent
        precise = torch.promote_types(weight.dtype, torch.float32)
        up = torch.cat([weight.to(precise), *(found.to(weight.device, precise) for found in self.ups[name])], 1)
        return _narrow(up, torch.cat([change, downs]).to(precise))


def _narrow(up: Float[Tensor, "out k"], down: Float[Tensor, "k d"]) -> LowRank:
    """Their product through as few coordinates as its shape needs."""
    if up.shape[0] >= down.shape[1]:
        return LowRank(*capped(up, down))
    right, left = capped(down.T, up.T)
    return LowRank(left.T.contiguous(), right.T.contiguous())


def _letters(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _load(file: Path, run: str) -> Deltas:
    tensors = load_tensors(file, expected=["run"])
    if not torch.equal(tensors.pop("run"), _letters(run)):
        raise ValueError(f"{file} is the checkpoint of another run; delete it or write somewhere else.")
    names = dict.fromkeys(name.rpartition(":")[0] for name in tensors)
    return {name: LowRank(tensors[f"{name}:up"], tensors[f"{name}:down"]) for name in names}
