"""Textual inversion of an erased model: Concept Inversion (Pham et al. 2023, arXiv 2308.01508)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptx.attacks.attack import Goal
from conceptx.attacks.embeddings import found, frozen, standing_in
from conceptx.models.diffusion_sites import TEXT_ENCODERS
from conceptx.models.modes import evaluating
from conceptx.train.loop import Plan, train

if TYPE_CHECKING:
    from conceptx.models import ImageModel
    from conceptx.models.diffusion import DiffusionModel

STAND_INS = ("q", "z", "x", "j", "w", "v")  # words whose embedding the learnt one replaces in its own prompts


@dataclass(frozen=True)
class TextualInversion:
    """Learn an embedding for a new word from pictures of the concept: if it comes back, the weights still hold it.

    Concept Inversion (Pham, Marshall, Cohen, Mittal, Hegde 2023, arXiv 2308.01508), its plain form.

    min over v of E |e - e_θ(a x + s e, t, prompt(v))|², x the latent (mean of the encoder) of one of the pictures,
    t uniform over all timesteps, everything but v frozen. With several text encoders each has its own v.

    templates:     prompts with {} for the new word, one drawn for each picture.
    initial:       a word from whose embedding v starts ("art" for styles in the authors' code); None: the mean of all
                   embeddings.
    steps, batch_size, learning_rate, weight_decay: of AdamW. The authors' 5,000 updates with 16 pictures at .08 (their
                   5e-3 is scaled by the batch); weight decay pulls on v, as with them.
    """

    templates: tuple[str, ...] = (
        "a photo of a {}",
        "a picture of a {}",
        "a good photo of the {}",
        "a close-up photo of a {}",
    )
    initial: str | None = None
    steps: int = 5000
    batch_size: int = 16
    learning_rate: float = 0.08
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive, got {self.steps} and {self.batch_size}.")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError("learning_rate must be positive and weight_decay not negative, both finite.")
        if wrong := [template for template in self.templates or ("",) if template.count("{}") != 1]:
            raise ValueError(f"A template has {{}} once, for the new word; got {wrong[0]!r}.")

    def search(self, model: ImageModel, goal: Goal, *, seed: int = 0) -> LearntToken:
        """The embedding learnt on the model as it is, edits in force included. The model is left bit-identical.

        Raises ValueError for a model that is no pipeline of diffusers, when the goal has no pictures, when they are not
        of the model's size, or when a prompt is too long.
        """
        from accelerate import Accelerator

        model = _pipeline(model)
        latents = _latents(model, goal)
        word = _stand_in(model, self.templates)
        student = _Token(_starts(model, word, self.initial))
        losses: list[float] = []
        plan = Plan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=seed,
            run="",
            weight_decay=self.weight_decay,
            gradient_clip=0.0,
            what=f"inverting {goal.name}",
        )
        with evaluating(model.module), frozen(model.module):
            loss = partial(self._loss, model, latents, word, losses)
            train(student, lambda _: [None], loss, plan, Accelerator(cpu=model.device.type == "cpu"))
        return LearntToken(goal.name, word, student.values(), self.templates, tuple(losses))

    def _loss(
        self,
        model: DiffusionModel,
        latents: Float[Tensor, "m c h w"],
        word: str,
        losses: list[float],
        student: Any,
        _: None,
    ) -> Tensor:
        """On pictures, templates, timesteps and noise from the step's own random numbers."""
        clean = latents[torch.randint(len(latents), (self.batch_size,))]
        texts = [
            self.templates[i].format(word) for i in torch.randint(len(self.templates), (self.batch_size,)).tolist()
        ]
        loss = noise_loss(model, clean, texts, {word: student.rows})
        losses.append(float(loss.detach()))
        return loss


def _pipeline(model: ImageModel) -> DiffusionModel:
    from conceptx.models import DiffusionModel

    if not isinstance(model, DiffusionModel):
        raise ValueError(f"Textual inversion acts on a DiffusionModel, got a {type(model).__name__}.")
    return model


def noise_loss(
    model: DiffusionModel,
    clean: Float[Tensor, "n c h w"],
    texts: Sequence[str],
    words: Mapping[str, Mapping[str, Tensor]],
) -> Float[Tensor, ""]:
    """Mean squared error of the predicted noise at random timesteps, with words replaced by embeddings.

    words: word -> text encoder -> rows, as in `replaced`. Draws timesteps and noise from torch's own random numbers.
    """
    times = _random_timesteps(model, len(clean))
    noise = torch.randn(clean.shape).to(clean.device)
    signal, spread = model.schedule.level(times)
    names = list(dict.fromkeys(texts))
    with ExitStack() as stack:
        for word, rows in words.items():
            stack.enter_context(replaced(model, word, rows))
        prompts = model.encode(names, differentiable=True).select([names.index(text) for text in texts])
    return (model.predict(signal * clean + spread * noise, times, prompts) - noise).square().mean()


def _random_timesteps(model: DiffusionModel, count: int) -> Tensor:
    """Uniform over the schedule; whole numbers unless it is a flow."""
    length = model.schedule.config.get("num_train_timesteps", 1000)
    drawn = torch.rand(count) * length
    return (drawn if model.schedule.kind == "flow" else drawn.long()).to(model.device)


# -- what was learnt -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LearntToken:
    """A word with a learnt embedding.

    name:      of what it was learnt on.
    word:      the stand-in: inside `inserted` this word of a prompt has the learnt embedding.
    rows:      text encoder -> (tokens of the stand-in, d).
    templates: those of the attack.  losses: one a step.
    """

    name: str
    word: str
    rows: Mapping[str, Tensor]
    templates: tuple[str, ...]
    losses: tuple[float, ...]

    @contextmanager
    def inserted(self, model: DiffusionModel) -> Iterator[None]:
        """The word has its learnt embedding for the length of the block."""
        with replaced(model, self.word, self.rows):
            yield

    def generate(self, model: DiffusionModel, *, seeds: Sequence[int], **options: Any) -> Float[Tensor, "n 3 h w"]:
        """Pictures in [0, 1], one for each seed, the templates in turn."""
        prompts = [self.templates[i % len(self.templates)].format(self.word) for i in range(len(seeds))]
        with self.inserted(model):
            return model.generate(prompts, seeds=seeds, **options)


class _Token(nn.Module):
    """The learnt rows as the only parameters there are."""

    def __init__(self, starts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = nn.ParameterDict(dict(starts))

    def values(self) -> dict[str, Tensor]:
        return {name: rows.detach().cpu().clone() for name, rows in self.rows.items()}


# -- words and their embeddings --------------------------------------------------------------------------------


@contextmanager
def replaced(model: DiffusionModel, word: str, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Wherever the word stands in a prompt, its tokens have these embeddings; tokenizers and tables stay untouched.

    rows: text encoder -> (tokens of the word, d). Differentiable in them.
    """
    with ExitStack() as stack:
        for name, (encoder, tokenizer) in _encoders(model).items():
            stack.enter_context(standing_in(_tables(encoder), _tokens(tokenizer, word), rows[name]))
        yield


def _encoders(model: DiffusionModel) -> dict[str, tuple[Any, Any]]:
    """name -> (text encoder, tokenizer)"""
    pairs = {
        name: (
            getattr(model.pipeline, name, None),
            getattr(model.pipeline, name.replace("text_encoder", "tokenizer"), None),
        )
        for name in TEXT_ENCODERS
    }
    return {name: pair for name, pair in pairs.items() if pair[0] is not None}


def _tables(encoder: Any) -> list[nn.Embedding]:
    """The modules that look tokens up; two may share one weight (T5)."""
    weight = encoder.get_input_embeddings().weight
    return [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight is weight]


def _tokens(tokenizer: Any, word: str) -> list[int]:
    """As they are inside a prompt, without the special ones."""
    return tokenizer(word, add_special_tokens=False).input_ids


def _stand_in(model: DiffusionModel, templates: Sequence[str]) -> str:
    """A word that every tokenizer knows and that stands in the prompts once, where {} is."""
    tokenizers = [tokenizer for _, tokenizer in _encoders(model).values()]
    for word in STAND_INS:
        texts = [template.format(word) for template in templates]
        if all(_fits(tokenizer, word, texts) for tokenizer in tokenizers):
            return word
    raise ValueError(f"No stand-in for the new word: none of {', '.join(STAND_INS)} is free in the templates.")


def _fits(tokenizer: Any, word: str, texts: Sequence[str]) -> bool:
    tokens = _tokens(tokenizer, word)
    if not tokens or set(tokens) & {*tokenizer.all_special_ids}:  # the unknown token is one of them
        return False
    return all(int(found(torch.tensor([tokenizer(text).input_ids]), tokens).sum()) == 1 for text in texts)


def _starts(model: DiffusionModel, word: str, initial: str | None) -> dict[str, Tensor]:
    """The rows from which learning starts, float32."""
    starts = {}
    for name, (encoder, tokenizer) in _encoders(model).items():
        table = encoder.get_input_embeddings().weight.detach().float()
        chosen = table if initial is None else table[_tokens(tokenizer, initial)]
        if not len(chosen):
            raise ValueError(f"The initial word {initial!r} has no token.")
        starts[name] = chosen.mean(0).repeat(len(_tokens(tokenizer, word)), 1)
    return starts


# -- small things ----------------------------------------------------------------------------------------------


def _latents(model: DiffusionModel, goal: Goal) -> Float[Tensor, "m c h w"]:
    if goal.images is None or not len(goal.images):
        raise ValueError(f"Textual inversion needs pictures of {goal.name!r}; the goal has none.")
    if goal.images.ndim != 4:
        raise ValueError(f"Pictures have the shape (n, 3, height, width), got {tuple(goal.images.shape)}.")
    latents = model.to_latents(goal.images)
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(
            f"Pictures of shape {tuple(goal.images.shape[1:])} have latents of shape {tuple(latents.shape[1:])}; "
            f"the model's are {model.latent_shape}."
        )
    return latents
