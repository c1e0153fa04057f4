"""The verb of every method: `erase(model, concept) -> Edit`; methods on vectors also `fit(X, z) -> Subspace`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, Self, final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.geometry import Array, ConceptMap, Subspace
from conceptx.models import LanguageModel
from conceptx.progress import track


class Eraser(ABC):
    """One published system: a frozen dataclass of its settings, with defaults as published."""

    @abstractmethod
    def erase(self, model: Any, concept: Concept, *, seed: int = 0) -> Edit:
        """The edit that takes the concept out of the model; the model itself stays bit for bit as it is."""

    @classmethod
    @final
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The eraser with settings from JSON or TOML, checked and converted (a list becomes a tuple, and so on).

        Raises ValueError that names the settings there are when one is unknown or of the wrong kind.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
        try:
            return TypeAdapter(cls).validate_python(dict(settings))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ").rstrip(".")
            raise ValueError(f"{cls.__name__}{' ' + where if where else ''}: {message}.") from None


class VectorEraser(Eraser):
    """A method that finds a concept's subspace in labelled vectors, and so in the hidden states of a model."""

    @abstractmethod
    def fit(self, X: Array, z: Array) -> Subspace:
        """The subspace of the concept z in the vectors X (n, d)."""

    @final
    def erase(
        self, model: LanguageModel, concept: Concept, *, sites: Sequence[str] | None = None, seed: int = 0
    ) -> Edit:
        """An edit of activation maps, one for each site, fitted in the order of the layers.

        Each map is fitted on what the maps before it leave (concept scrubbing, LEACE paper, algorithm 1). The labels
        are the concept's `classes`, or else `texts` against `retain_texts`; every token has its text's label.

        sites: default, the inputs of all attention and MLP sublayers, which `Edit.fold` can turn into weights.
        Raises ValueError when the concept has no labelled texts, KeyError for an unknown site; the model is unchanged.
        """
        model.require_unedited()
        wanted = ordered_sites(model, sites)
        texts, labels = labelled_texts(concept)
        eraser = self._seeded(seed)
        maps: dict[str, tuple[ConceptMap, ...]] = {}
        for site in track(wanted, "erasing layer by layer"):
            with Edit(model.fingerprint, maps=maps).applied(model):
                states, z = labelled_states(model, texts, labels, site)
            maps[site] = (eraser.fit(states, z).removal(),)
        return Edit(model.fingerprint, maps=maps, provenance=(provenance(self, concept, seed, sites=list(wanted)),))

    def _seeded(self, seed: int) -> VectorEraser:
        """The same settings with the seed, where the method has one."""
        fields = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return dataclasses.replace(self, seed=seed) if "seed" in fields else self  # type: ignore[type-var]


def labelled_texts(concept: Concept) -> tuple[list[str], list[int]]:
    """Texts and class numbers of a concept. Raises ValueError when it has not two kinds of texts."""
    groups = list(concept.classes.values()) or [concept.retain_texts, concept.texts]
    if not all(groups):
        raise ValueError(f"Concept {concept.name!r} needs classes, or texts and retain_texts, to learn labels from.")
    labels = [label for label, texts in enumerate(groups) for _ in texts]
    return list(chain.from_iterable(groups)), labels


def labelled_states(model: LanguageModel, texts: list[str], labels: list[int], site: str) -> tuple[Tensor, Tensor]:
    """The activations (tokens, d) of all texts at a site, in float32, and the label of each token's text."""
    states = torch.cat([found[site].float().cpu() for found in model.record(texts, [site])])
    lengths = torch.tensor([len(row) for row in model.encode(texts)])
    return states, torch.tensor(labels).repeat_interleave(lengths)


def ordered_sites(model: LanguageModel, sites: Sequence[str] | None) -> list[str]:
    """The sites in the order in which activations pass them."""
    if sites is None:
        return [name for name in model.sites if name.endswith(("attention_input", "mlp_input"))]
    if not sites:
        raise ValueError("No site was given.")
    asked = {model.site(name).name for name in sites}
    return [name for name in model.sites if name in asked]


def provenance(eraser: Any, concept: Concept, seed: int, **more: Any) -> Mapping[str, Any]:
    """What an edit records of its making."""
    return {
        "method": type(eraser).__name__,
        "settings": dataclasses.asdict(eraser),
        "concept": concept.name,
        "seed": seed,
        "versions": {package: version(package) for package in ("conceptx", "torch", "transformers")},
        **more,
    }
