"""The verb of every method: `erase(model, concept) -> Edit`; methods on vectors also `fit(X, z) -> Subspace`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, Self, final

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.geometry import Array, ConceptMap, Subspace
from conceptx.models import Model
from conceptx.progress import track
from conceptx.settings import build


class Eraser(ABC):
    """One published system: a frozen dataclass of its settings, with defaults as published."""

    @abstractmethod
    def erase(self, model: Any, concept: Concept, *, seed: int = 0) -> Edit:
        """The edit that takes the concept out of the model; the model itself stays bit for bit as it is."""

    @final
    def _accept(self, model: Any) -> None:
        """Raises ValueError when the method does not act on this kind of model, or when an edit is in force on it."""
        known = hosts(type(self))
        if not {kind.__name__ for kind in type(model).__mro__} & {*known}:
            raise ValueError(f"{type(self).__name__} acts on: {' or '.join(known)}; got: {type(model).__name__}.")
        model.require_unedited()

    @final
    def _require(self, concept: Concept, *names: str) -> None:
        """Raises ValueError when the concept has nothing in one of these fields."""
        if missing := [name for name in names if not getattr(concept, name)]:
            raise ValueError(f"{type(self).__name__} needs the concept's {missing[0]}; {concept.name!r} has none.")

    @classmethod
    @final
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The eraser with settings from JSON or TOML, checked and converted (a list becomes a tuple, and so on).

        Raises ValueError that names the settings there are when one is unknown or of the wrong kind.
        """
        return build(cls, settings)


class VectorEraser(Eraser):
    """A method that finds a concept's subspace in labelled vectors, and so in the hidden states of a model."""

    @abstractmethod
    def fit(self, X: Array, z: Array) -> Subspace:
        """The subspace of the concept z in the vectors X (n, d)."""

    @final
    def erase(
        self,
        model: Model,
        concept: Concept,
        *,
        sites: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Edit:
        """An edit of activation maps, one for each site, fitted in the order of the layers.

        Each map is fitted on what the maps before it leave (concept scrubbing, LEACE paper, algorithm 1). The labels
        are the concept's `classes`, or else `texts` against `retain_texts`; every token has its text's label.

        sites: default, the inputs of all attention and MLP sublayers, which `Edit.fold` can turn into weights.
        Raises ValueError when the concept has no labelled texts, KeyError for an unknown site; the model is unchanged.
        """
        self._accept(model)
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


def labelled_states(model: Model, texts: list[str], labels: list[int], site: str) -> tuple[Tensor, Tensor]:
    """The activations (tokens, d) of all texts at a site, in float32, and the label of each token's text."""
    states = torch.cat([found[site].float().cpu() for found in model.record(texts, [site])])
    lengths = torch.tensor(model.lengths(texts, site))
    return states, torch.tensor(labels).repeat_interleave(lengths)


def ordered_sites(model: Model, sites: Sequence[str] | None) -> list[str]:
    """The sites in the order in which activations pass them."""
    if sites is None:
        return list(model.default_sites)
    if not sites:
        raise ValueError("No site was given.")
    asked = {model.site(name).name for name in sites}
    return [name for name in model.sites if name in asked]


def hosts(eraser: type[Eraser]) -> tuple[str, ...]:
    """The names of the wrappers that the method acts on, read from the annotation of `erase(model: ...)`."""
    annotation = typing.get_type_hints(eraser.erase)["model"]
    return tuple(host.__name__ for host in typing.get_args(annotation) or (annotation,))


def as_concepts(concept: Concept | Sequence[Concept]) -> list[Concept]:
    """One concept or several, as a list. Raises ValueError when there is none, or something else among them."""
    concepts = [concept] if isinstance(concept, Concept | str) else list(concept)
    if not concepts:
        raise ValueError("No concept was given.")
    if wrong := [c for c in concepts if not isinstance(c, Concept)]:
        raise ValueError(f"erase takes a Concept, got {wrong[0]!r}; write Concept({str(wrong[0])!r}).")
    return concepts


def all_names(concepts: Sequence[Concept], *fields: str) -> list[str]:
    """The names in some fields of all concepts, each once."""
    values = (getattr(concept, field) for concept in concepts for field in fields)
    return list(dict.fromkeys(n for value in values for n in ([value] if isinstance(value, str) else value or ())))


def check_roles(concepts: Sequence[Concept]) -> None:
    """Raises ValueError unless there are concepts and they agree on what goes and what stays."""
    names = [concept.name.casefold() for concept in concepts]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"These concepts are given more than once: {', '.join(double)}.")
    erased = {name.casefold() for name in all_names(concepts, "name", "synonyms")}
    for field, role in (("retain", "retained"), ("anchor", "an anchor")):
        if clash := [name for name in all_names(concepts, field) if name.casefold() in erased]:
            raise ValueError(f"What is to be erased cannot be {role} as well: {', '.join(clash)}.")


def provenance(eraser: Any, concept: Concept | Sequence[Concept], seed: int, **more: Any) -> Mapping[str, Any]:
    """What an edit records of its making; several concepts are named in one line."""
    concepts = as_concepts(concept)
    packages = ["conceptx", "torch", "transformers", *["diffusers"] * ("DiffusionModel" in hosts(type(eraser)))]
    return {
        "method": type(eraser).__name__,
        "settings": dataclasses.asdict(eraser),
        "concept": ", ".join(c.name for c in concepts),
        "seed": seed,
        "versions": {package: version(package) for package in packages},
        **more,
    }


def run_identity(record: Mapping[str, Any], concept: Concept | Sequence[Concept], model: Model) -> str:
    """A hash of everything that determines a training, by which a checkpoint knows its own run."""
    concepts = [c.model_dump(mode="json") for c in as_concepts(concept)]
    parts = [record, concepts, model.fingerprint.digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
