"""ESD, Erasing Concepts from Diffusion Models (Gandikota, Materzyńska, Fiotto-Kaufman, Bau 2023, arXiv 2303.07345)."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, as_concepts, provenance, run_identity
from conceptx.geometry import steer
from conceptx.models import DiffusionModel, Prompts, evaluating
from conceptx.models.adapters import Adapter, adapter_in_place
from conceptx.models.weights import Student, in_float32, weights_in_place
from conceptx.settings import require_choices, require_positive, tunable
from conceptx.train.loop import Plan, train

Variant = Literal["x", "u", "full", "x-strict"]
Trajectory = Literal["edited", "frozen"]
Phrases = Literal["prompts", "names"]


@dataclass(frozen=True)
class Names:
    """How an architecture names its parameters: regular expressions of names inside the denoiser.

    cross:       the attention between image and text.
    keys_values: what of it makes keys and values out of the text.
    ends:        what "u" leaves alone besides: the embeddings of time and text, the output layers.
    """

    cross: str
    keys_values: str
    ends: str

    def take(self, name: str, variant: Variant) -> bool:
        """Whether the variant trains the parameter."""
        if variant == "u":
            return not re.search(self.cross, name) and not re.match(self.ends, name)
        pattern = {"x": self.cross, "x-strict": self.keys_values, "full": ""}[variant]
        return re.search(pattern, name) is not None


UNET = Names(
    cross=r"\.attn2\.",
    keys_values=r"\.attn2\.to_[kv]\.",
    ends=r"(time_embedding|add_embedding|conv_norm_out|conv_out)\.",
)
# Image and text attend to each other in one attention; "cross" is here what the text has of its own in it.
JOINT = Names(
    cross=r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    keys_values=r"\.attn\.add_[kv]_proj\.",
    ends=r"(time_text_embed|context_embedder|norm_out|proj_out)\.",
)
NAMES = {"UNet2DConditionModel": UNET, "SD3Transformer2DModel": JOINT, "FluxTransformer2DModel": JOINT}


@dataclass(frozen=True)
class ESD(Eraser):
    """Fine-tune a denoiser so that, asked for the concept, it predicts what it was guided away from (arXiv 2303.07345).

    The loss is the mean of (e_theta(x_t, c) - y)^2 with y = e(x_t, "") - eta (e(x_t, c) - e(x_t, "")) of the frozen
    model (paper, eq. 6). x_t is a partly denoised sample of the model that is being edited, asked for c.

    variant:           what is trained. "x": the cross-attention; "u": everything else but time embedding and output
                       layers (also of the pooled text of SDXL); "full": all; "x-strict": keys and values of the
                       cross-attention.
    negative_guidance: eta of the PAPER. The authors' code of 2025 counts from one more: its default 2 is eta = 1.
    guidance:          of the samples x_t.
    sampling_steps:    of the sampler that makes x_t; each stops before one of them, drawn uniformly.
    trajectory:        whose samples x_t are: "edited" (paper, first code) or "frozen" (code of 2025).
    erase_from:        a prompt that contains more than the concept ("a cowboy"; the concept: "cowboy hat"). It is what
                       x_t and the student are asked for, and y = e(erase_from) - (1 + eta) (e(c) - e("")) (code of
                       2025). None: the concept itself; both forms are then one.
    phrases:           what c is, drawn for each row: the concept's "prompts", where it has some, or its "names" (the
                       name and the synonyms).
    rank:              None: the weights themselves (paper). A number: a LoRA adapter of that rank on the linear layers
                       among them; convolutions, norms and biases are then left alone.
    steps, batch_size, learning_rate: of Adam. A step has batch_size rows, each with its own noise, c and stop.

    Defaults are those of the paper. Different from the authors' code: the student is the user's own denoiser; the
    teacher is the adapter switched off, or the trained parameters' old values swapped in, so that no second denoiser is
    in memory. Parameters are chosen by the names of diffusers (the rule of the first code, copied, would train the
    output layers too; the code of 2025 trains the time embedding, and no norms). A latent has the noise level of its
    timestep (first code: 39 to 58 of 1000 steps cleaner), and timesteps are those of the sampler, not all 1000. The
    loss is on the noise whatever the denoiser predicts. "No prompt" is what the pipeline takes for it under guidance
    (SDXL: zeros). Nothing is published for SD 3 and FLUX: "x" there is what the text has of its own in the joint
    attention.
    """

    variant: Variant = "x"
    negative_guidance: float = tunable(1.0, 0.5, 8.0, log=True)  # η
    guidance: float = 3.0
    sampling_steps: int = 50
    trajectory: Trajectory = "edited"
    erase_from: str | None = None
    phrases: Phrases = "prompts"
    rank: int | None = None
    steps: int = tunable(1000, 50, 1000, log=True)
    batch_size: int = 1
    learning_rate: float = tunable(1e-5, 1e-6, 1e-3, log=True)

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "sampling_steps", "rank", "steps", "batch_size", "learning_rate")
        if not (math.isfinite(self.negative_guidance) and math.isfinite(self.guidance)):
            raise ValueError("negative_guidance and guidance must be finite.")
        if self.erase_from is not None and not self.erase_from.strip():
            raise ValueError("erase_from must be a prompt or None, it is blank.")

    def erase(
        self,
        model: DiffusionModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ) -> Edit:
        """Train, and return the change as an edit: dense, or low-rank with an adapter. The model stays as it is.

        Weights in half precision are trained in float32 (an update of 1e-5 would be rounded away).
        concept:    one or several; their phrases share the rows.
        checkpoint: a folder for the training state; run the same call again after an interruption and it goes on where
                    it stopped, with the same result. One process only.

        Raises ValueError when no concept is given, when the tokenizer would cut a phrase, when the variant selects
        nothing in this denoiser, when an edit is in force on the model, when several processes call it, or when the
        checkpoint belongs to another run.
        """
        from accelerate import Accelerator

        self._accept(model)
        names = chosen(model, self.variant)
        concepts = as_concepts(concept)
        prompts = _Asked.of(model, self._phrases(concepts), self.erase_from)
        record = provenance(self, concepts, seed)
        run = run_identity(record, concepts, model)
        plan = Plan.bare(self.steps, self.learning_rate, seed=seed, run=run, folder=checkpoint)
        accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
        if accelerator.num_processes > 1:
            raise ValueError(f"ESD trains in one process, there are {accelerator.num_processes}; start it alone.")
        with self._student(model, names, seed) as student:
            steps = _Steps(self, model, student, prompts, seed)
            train(student.module, steps.of, partial(_loss, model), plan, accelerator)
            deltas = student.deltas()
        return Edit(model.fingerprint, deltas=deltas, provenance=(record,))

    def _phrases(self, concepts: Sequence[Concept]) -> list[str]:
        """Everything that c may be, each once."""
        mine = (c.prompts if self.phrases == "prompts" else () for c in concepts)
        named = (prompts or (c.name, *c.synonyms) for c, prompts in zip(concepts, mine, strict=True))
        return list(dict.fromkeys(phrase for phrases in named for phrase in phrases))

    def _student(self, model: DiffusionModel, names: Sequence[str], seed: int) -> AbstractContextManager[Student]:
        if self.rank is None:
            return denoiser_in_place(model, names)
        linear = [name.removesuffix(".weight") for name in names if _linear(model.denoiser, name)]
        if not linear:
            raise ValueError(f"The variant {self.variant!r} selects no linear layer that could take an adapter.")
        paths = tuple(f"{model.denoiser_name}.{path}" for path in linear)
        return adapter_in_place(model, Adapter(self.rank, self.rank, 0.0, paths), seed)


def chosen(model: DiffusionModel, variant: Variant) -> list[str]:
    """Names, inside the denoiser, of the parameters that a variant trains.

    Raises ValueError when the denoiser's names are unknown or the variant selects none of them.
    """
    kind = type(model.denoiser).__name__
    if kind not in NAMES:
        raise ValueError(f"ESD does not know the parameter names of {kind}; known: {', '.join(NAMES)}.")
    names = [name for name, _ in model.denoiser.named_parameters() if NAMES[kind].take(name, variant)]
    if not names:
        raise ValueError(f"The variant {variant!r} selects no parameter of this {kind}.")
    return names


# -- the student and its teacher, in one denoiser ------------------------------------------------------------------


@contextmanager
def denoiser_in_place(model: DiffusionModel, names: Sequence[str]) -> Iterator[Student]:
    """The named parameters themselves, the whole denoiser in float32; the teacher is their old values."""
    with in_float32(model.denoiser), weights_in_place(model.denoiser, names, f"{model.denoiser_name}.") as student:
        yield student


def _linear(module: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(path), nn.Linear)


# -- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
    """The encoded prompts: `count` phrases, then no prompt, then `erase_from` where there is one."""

    encoded: Prompts
    count: int

    @staticmethod
    def of(model: DiffusionModel, phrases: Sequence[str], erase_from: str | None) -> _Asked:
        encoded = model.encode(phrases) + model.unconditional()
        return _Asked(encoded if erase_from is None else encoded + model.encode([erase_from]), len(phrases))

    @property
    def broader(self) -> bool:
        """Whether there is a prompt to erase from."""
        return len(self.encoded) > self.count + 1

    def student(self, rows: Sequence[int]) -> Prompts:
        """What the student is asked for in these rows."""
        return self.encoded.select([self.count + 1] * len(rows) if self.broader else rows)

    def teacher(self, rows: Sequence[int]) -> Prompts:
        """No prompt, the concept, and perhaps the broader prompt, for all rows."""
        empty, broader = [self.count] * len(rows), [self.count + 1] * len(rows) * self.broader
        return self.encoded.select([*empty, *rows, *broader])


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a step: latents (n, c, h, w), timesteps (n,), what the student is asked for, what it shall predict."""

    latents: Tensor
    timesteps: Tensor
    prompts: Prompts
    target: Tensor


@dataclass(frozen=True)
class _Steps:
    """The rows of a step: a function of its number and of the student as it is then."""

    settings: ESD
    model: DiffusionModel
    student: Student
    asked: _Asked
    seed: int

    @torch.no_grad()
    def of(self, step: int) -> list[_Rows]:
        s, draw = self.settings, random.Random(f"{self.seed} {step}")
        rows = [draw.randrange(self.asked.count) for _ in range(s.batch_size)]
        stops = [draw.randrange(s.sampling_steps) for _ in rows]
        seeds = [draw.getrandbits(31) for _ in rows]
        prompts = self.asked.student(rows)
        with evaluating(self.model.denoiser):
            with self._walker():
                latents, timesteps = self.model.rollout(
                    prompts, steps=s.sampling_steps, stop=stops, seeds=seeds, guidance=s.guidance
                )
            return [_Rows(latents, timesteps, prompts, self._target(latents, timesteps, rows))]

    def _walker(self) -> AbstractContextManager[Any]:
        """The model whose samples are x_t."""
        return self.student.teacher() if self.settings.trajectory == "frozen" else evaluating(self.model.denoiser)

    def _target(self, latents: Tensor, timesteps: Tensor, rows: Sequence[int]) -> Tensor:
        """y, from one call of the frozen model."""
        eta, times = self.settings.negative_guidance, 3 if self.asked.broader else 2
        x, t = latents.repeat(times, 1, 1, 1), timesteps.repeat(times)
        with self.student.teacher():
            noise = self.model.predict(x, t, self.asked.teacher(rows))
        neutral, concept, *broader = noise.chunk(times)
        if broader:
            return steer(broader[0], neutral, [concept], [-(1 + eta)])
        return steer(neutral, neutral, [concept], [-eta])


def _loss(model: DiffusionModel, _: nn.Module, rows: _Rows) -> Tensor:
    """The student is the model's own denoiser."""
    return (model.predict(rows.latents, rows.timesteps, rows.prompts) - rows.target).square().mean()
