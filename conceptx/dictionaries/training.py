"""Sparse autoencoders trained on the activations of a model, by the trainer of sae-lens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conceptx.dictionaries.files import imported_sae_lens, save_dictionary, sparse_dictionary
from conceptx.dictionaries.states import lengths_of, recorded
from conceptx.geometry import SparseDictionary, reconstruction
from conceptx.models import DiffusionModel, Model
from conceptx.progress import report
from conceptx.store import load_tensors, save_tensors

logger = logging.getLogger("conceptx")
CHECKPOINT = "training.safetensors"
CHECKPOINT_EVERY = 50  # steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
COUNTS = ("width", "k", "steps", "batch_size", "dead_after", "buffer")


@dataclass(frozen=True)
class SAETraining:
    """How to train a sparse autoencoder. The defaults suit a model of some hundred million parameters on a CPU.

    architecture: "topk" keeps the k largest features; "jumprelu" learns a threshold for each, aiming at k on average.
    width:        the number of features.
    steps:        of Adam, on batch_size activations each; the texts are gone through as often as that takes.
    learning_rate: falls to zero over the last fifth of the steps.
    l0_coefficient: weight of the loss that drives "jumprelu" towards k features; it grows over the first fifth.
    dead_after:   steps without firing after which a feature counts as dead ("topk" then trains it on what is missing).
    buffer:       how many activations are held and shuffled at once; texts with more are read anew in every round.
    held_out:     the share of the texts that only measures.

    Raises ValueError for settings that make no sense.
    """

    architecture: Literal["topk", "jumprelu"] = "topk"
    width: int = 2304
    k: int = 32
    steps: int = 200
    batch_size: int = 1024
    learning_rate: float = 3e-3
    l0_coefficient: float = 1.0
    dead_after: int = 100
    buffer: int = 2**18
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if self.architecture not in ("topk", "jumprelu"):
            raise ValueError(f"Unknown architecture {self.architecture!r}; available: topk, jumprelu.")
        if wrong := [name for name in COUNTS if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(wrong)} must be positive.")
        if self.k > self.width:
            raise ValueError(f"k = {self.k} features cannot be active where there are {self.width}.")
        if self.buffer < self.batch_size:
            raise ValueError(f"A buffer of {self.buffer} activations holds no batch of {self.batch_size}.")
        if not (0 < self.learning_rate < math.inf and 0 < self.l0_coefficient < math.inf):
            raise ValueError("learning_rate and l0_coefficient must be positive and finite.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}.")


@dataclass(frozen=True)
class TrainingReport:
    """How a trained dictionary does on texts that it was not trained on.

    tokens, held_out_tokens: how many activations were trained and measured on.
    unexplained: fraction of the held-out variance (FVU).  active: mean number of features of an activation (L0).
    dead:        how many features fired at nothing in the last `dead_after` steps.
    """

    tokens: int
    held_out_tokens: int
    unexplained: float
    active: float
    dead: int


@dataclass(frozen=True, eq=False)
class TrainedDictionary:
    """A dictionary with its report, and the site, settings, seed, model and versions that made it."""

    dictionary: SparseDictionary
    report: TrainingReport
    provenance: Mapping[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write it as `save_dictionary` does; report and provenance are its metadata."""
        save_dictionary(self.dictionary, folder, **self.provenance, report=dataclasses.asdict(self.report))


def train_dictionary(
    model: Model,
    site: str,
    texts: Sequence[str],
    settings: SAETraining | None = None,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
) -> TrainedDictionary:
    """Train a sparse autoencoder on the activations of the texts at a site, in float32 on the model's device.

    model:  a language model, or a pipeline with a site inside one of its text encoders.
    folder: for a checkpoint; run the same call again after an interruption and it goes on where it stopped, with the
            same result. A text that occurs twice counts once. The model stays as it is.

    Raises ValueError when the texts are too few or too long or blank, when an edit is in force on the model, or when
    the checkpoint belongs to another run, KeyError for an unknown site, FloatingPointError when the loss is not finite,
    ImportError when sae-lens is not installed.
    """
    settings = settings or SAETraining()
    imported_sae_lens()
    model.require_unedited()
    model.site(site)
    learnt, measured = _split(texts, settings.held_out, seed)
    stream = _Stream(model, site, learnt, settings, seed)
    run = _identity(model, site, learnt, measured, settings, seed)
    trainer = _trainer(model.width(site), settings, seed, str(model.device))
    _train(trainer, stream, settings, None if folder is None else Path(folder) / CHECKPOINT, run)
    dictionary = sparse_dictionary(trainer.sae.cfg.to_dict(), trainer.sae.state_dict())
    states = recorded(model, measured, site)
    quality = reconstruction(dictionary, states)
    dead = int((trainer.n_forward_passes_since_fired >= settings.dead_after).sum())
    outcome = TrainingReport(stream.tokens, len(states), quality.unexplained, quality.active, dead)
    return TrainedDictionary(dictionary, outcome, _provenance(model, site, settings, seed))


# -- data --------------------------------------------------------------------------------------------------------------


def _split(texts: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Different texts in random order: to train on, and held out."""
    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        raise ValueError(f"A dictionary needs two different texts or more, got {len(different)}.")
    random.Random(seed).shuffle(different)
    held = min(max(1, round(share * len(different))), len(different) - 1)
    return different[held:], different[:held]


class _Stream:
    """Batches of activations (batch_size, d), each a function of its step alone.

    The texts are cut into parts that fit the buffer. An epoch goes through the parts in turn, each shuffled anew; what
    does not fill a batch at the end of a part is left out for that epoch.
    """

    def __init__(self, model: Model, site: str, texts: list[str], settings: SAETraining, seed: int) -> None:
        self.model, self.site, self.texts, self.seed = model, site, texts, seed
        self.size = settings.batch_size
        lengths = lengths_of(model, texts, site)
        self.tokens = sum(lengths)
        self.parts = _parts(lengths, settings.buffer)
        self.batches = [sum(lengths[i] for i in part) // self.size for part in self.parts]
        if not sum(self.batches):
            raise ValueError(f"The texts give {self.tokens} activations to train on; a batch takes {self.size}.")
        self._held: tuple[int, Tensor] | None = None
        self._order: tuple[int, Tensor] | None = None

    def part(self, number: int) -> Tensor:
        """The activations of a part; the last one is kept."""
        if self._held is None or self._held[0] != number:
            self._held = None  # so that no two are in memory
            self._held = number, recorded(self.model, [self.texts[i] for i in self.parts[number]], self.site)
        return self._held[1]

    def batch(self, step: int) -> Tensor:
        epoch, place = divmod(step, sum(self.batches))
        number = 0
        while place >= self.batches[number]:
            place -= self.batches[number]
            number += 1
        states = self.part(number)
        order = self._shuffled(epoch * len(self.parts) + number, len(states))
        return states[order[place * self.size : (place + 1) * self.size]].float()

    def _shuffled(self, turn: int, rows: int) -> Tensor:
        if self._order is None or self._order[0] != turn:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn + 1) % 2**63)
            self._order = turn, torch.randperm(rows, generator=generator)
        return self._order[1]


def _parts(lengths: Sequence[int], buffer: int) -> list[list[int]]:
    """Consecutive numbers of texts, in as few parts of about equal length as the buffer asks for."""
    count = math.ceil(sum(lengths) / buffer)
    parts: list[list[int]] = [[] for _ in range(count)]
    done = 0
    for number, length in enumerate(lengths):
        if length:
            parts[done * count // sum(lengths)].append(number)
            done += length
    return parts


# -- training ----------------------------------------------------------------------------------------------------------


def _trainer(dim: int, settings: SAETraining, seed: int, device: str) -> Any:
    """The trainer of sae-lens around a new autoencoder. It is driven step by step: it logs and saves nothing itself."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = _autoencoder(dim, settings)
    config = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch_size,
        train_batch_size_samples=settings.batch_size,
        lr=settings.learning_rate,
        lr_end=settings.learning_rate,
        device=device,
        dead_feature_window=settings.dead_after,
    )
    return SAETrainer(cfg=config, sae=sae.to(device), data_provider=iter(()))


def _autoencoder(dim: int, settings: SAETraining) -> Any:
    import sae_lens

    sizes = {"d_in": dim, "d_sae": settings.width}
    if settings.architecture == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=settings.k, **sizes))
    return sae_lens.JumpReLUTrainingSAE(
        sae_lens.JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=settings.k,
            jumprelu_ste_to_input=True,  # else the thresholds alone, slowly, bring the number of features down
            jumprelu_bandwidth=2.0,
            jumprelu_init_threshold=0.3,
            l0_coefficient=settings.l0_coefficient,
            l0_warm_up_steps=settings.steps // 5,
            **sizes,
        )
    )


def _train(trainer: Any, stream: _Stream, settings: SAETraining, checkpoint: Path | None, run: str) -> None:
    """All steps that are not done yet; at the end the input's scale is folded into the weights."""
    begin = _resume(trainer, checkpoint, run)
    if begin is None:
        begin = 0
        _begin(trainer, stream.part(0))
    for step in range(begin, settings.steps):
        trainer.optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1, 5 * (1 - step / settings.steps))
        with torch.enable_grad():
            loss = float(trainer.step(stream.batch(step)).loss.detach())
        trainer.n_training_steps += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is not finite at step {step}; lower the learning rate.")
        report("training the dictionary", step + 1, settings.steps, f"loss {loss:.4g}")
        if checkpoint is not None and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps):
            _save(trainer, checkpoint, run)
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)


def _begin(trainer: Any, states: Tensor) -> None:
    """Scale the inputs to norm sqrt(d) on average, and start the output bias at their mean."""
    norms = states.norm(dim=1, dtype=torch.float32)
    scale = states.shape[1] ** 0.5 / float(norms.mean())
    trainer.activation_scaler.scaling_factor = scale
    trainer.sae.b_dec.data.copy_(scale * states.mean(0, dtype=torch.float32))


def _save(trainer: Any, path: Path, run: str) -> None:
    tensors = {
        "run": torch.tensor(list(run.encode()), dtype=torch.uint8),
        "step": torch.tensor(trainer.n_training_steps),
        "scale": torch.tensor(trainer.activation_scaler.scaling_factor, dtype=torch.float64),
        "since_fired": trainer.n_forward_passes_since_fired,
    }
    for name, parameter in trainer.sae.named_parameters():
        tensors[f"parameter:{name}"] = parameter
        tensors |= {f"{moment}:{name}": trainer.optimizer.state[parameter][moment] for moment in MOMENTS}
    save_tensors(path, tensors)


def _resume(trainer: Any, path: Path | None, run: str) -> int | None:
    """Load the checkpoint and return the number of steps done; None when there is no checkpoint."""
    if path is None or not path.is_file():
        return None
    tensors = load_tensors(path, expected=("run", "step", "scale", "since_fired"))
    if bytes(tensors["run"].tolist()).decode() != run:
        raise ValueError(f"{path} is the checkpoint of another run; delete it or write somewhere else.")
    done = int(tensors["step"])
    trainer.n_training_steps = done
    trainer.activation_scaler.scaling_factor = float(tensors["scale"])
    trainer.n_forward_passes_since_fired.copy_(tensors["since_fired"])
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.load_state_dict({"current_step": done})
    for name, parameter in trainer.sae.named_parameters():
        parameter.data.copy_(tensors[f"parameter:{name}"])
        moments = {moment: tensors[f"{moment}:{name}"].to(parameter.device) for moment in MOMENTS}
        trainer.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
    logger.info("resumed %s at step %d", path, done)
    return done


# -- records -----------------------------------------------------------------------------------------------------------


def _identity(model: Model, site: str, learnt: list[str], measured: list[str], settings: SAETraining, seed: int) -> str:
    """A hash of everything that determines a run, by which a checkpoint knows its own."""
    parts = [_provenance(model, site, settings, seed), learnt, measured, model.fingerprint.digest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _provenance(model: Model, site: str, settings: SAETraining, seed: int) -> dict[str, Any]:
    return {
        "site": site,
        "hook_name": model.site(site).module,
        "model_type": _config(model, site).model_type,
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "versions": {package: version(package) for package in ("conceptx", "torch", "transformers", "sae-lens")},
    }


def _config(model: Model, site: str) -> Any:
    """Of the model, or of the text encoder of a pipeline that the site lies in."""
    owner = getattr(model.pipeline, site.partition(".")[0]) if isinstance(model, DiffusionModel) else model.module
    return owner.config
