"""Can the concept still be read in the hidden states? Fresh probes on the layers of a language model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.probes import ProbeScore, linear_probe, mlp_probe
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel, batches
from conceptx.progress import track

PROBES: dict[str, Callable[..., ProbeScore]] = {"linear_probe": linear_probe, "mlp_probe": mlp_probe}
EVERY = 3  # layers between two that are probed
FEWEST = 4  # texts of a kind
BATCH = 8  # texts the model reads at a time


def probe_layers(
    model: LanguageModel,
    concept: Concept,
    *,
    edit: Edit | None = None,
    sites: Sequence[str] | None = None,
    texts: int = 200,
    seed: int = 0,
) -> Report:
    """How well probes tell the concept's texts from its retain_texts, a score for each site and kind of probe.

    A probe reads the mean activation over the tokens of a text. It is trained on one half of the texts, drawn by the
    seed, and tested on the other; as many texts of each kind are taken as there are of the rarer one, so that guessing
    gives .5. With an edit a new probe is trained on the edited model, beside that of the un-edited one: what it still
    reads, an attacker with access to the activations reads too.

    sites: default, the output of every third layer and of the last one.  texts: at most so many of each kind.
    Raises ValueError when the concept has fewer than four texts of a kind, or when an edit is in force beside the one
    given, KeyError for an unknown site.
    """
    model.require_unedited()
    names = _sites(model, sites)
    probing = _Probing.of(concept, texts, seed)
    unedited = probing.report(model, names, seed)
    if edit is None:
        return unedited
    with edit.applied(model):
        return probing.report(model, names, seed).beside(unedited)


def _sites(model: LanguageModel, sites: Sequence[str] | None) -> list[str]:
    if sites is None:
        layers = sorted({*range(0, model.depth, EVERY), model.depth - 1})
        return [f"layers.{layer}.output" for layer in layers]
    if not sites:
        raise ValueError("No site was given.")
    asked = {model.site(name).name for name in sites}
    return [name for name in model.sites if name in asked]


@dataclass(frozen=True)
class _Probing:
    """Texts with labels, in random order; the first half trains, the second tests."""

    texts: list[str]
    labels: Int[np.ndarray, " n"]

    @staticmethod
    def of(concept: Concept, most: int, seed: int) -> _Probing:
        """Both halves have as many texts of one kind as of the other."""
        kinds = [concept.retain_texts, concept.texts]
        fewest = min(most, *map(len, kinds))
        if fewest < FEWEST:
            raise ValueError(
                f"Probes need at least {FEWEST} texts and retain_texts, {concept.name!r} has {len(concept.texts)} and "
                f"{len(concept.retain_texts)}; at most {most} were to be taken."
            )
        draw = random.Random(seed)
        drawn = [draw.sample(texts, fewest - fewest % 2) for texts in kinds]
        pairs = [(text, label) for both in zip(*drawn, strict=True) for label, text in enumerate(both)]
        return _Probing([text for text, _ in pairs], np.array([label for _, label in pairs]))

    def report(self, model: LanguageModel, sites: Sequence[str], seed: int) -> Report:
        states = self._states(model, sites)
        return Report(tuple(track(self._scores(states, seed), "probes", len(sites) * len(PROBES))))

    def _scores(self, states: dict[str, Float[np.ndarray, "n d"]], seed: int) -> Iterator[Score]:
        half = len(self.labels) // 2
        for site, x in states.items():
            for name, probe in PROBES.items():
                found = probe(x[:half], self.labels[:half], x[half:], self.labels[half:], seed=seed)
                error = found.standard_error
                yield Score(site, name, found.accuracy, found.count, error, chance=found.majority)

    def _states(self, model: LanguageModel, sites: Sequence[str]) -> dict[str, Any]:
        """{site: (texts, d)}, the mean over a text's tokens."""
        means: dict[str, list[Tensor]] = {site: [] for site in sites}
        lengths = [len(row) for row in model.encode(self.texts)]
        recorded = model.record(self.texts, sites, batch_size=BATCH)
        for part, counts in zip(recorded, batches(lengths, BATCH), strict=True):
            for site, states in part.items():
                means[site] += [x.float().mean(0).cpu() for x in states.split(list(counts))]
        return {site: torch.stack(rows).numpy() for site, rows in means.items()}
