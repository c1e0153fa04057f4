"""ItD, Interpret then Deactivate (Tian, Nan, Xu, Zhai, Qu, Liu, Ren, Jia, Zhang 2025, arXiv 2503.09446)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from conceptx.concept import Concept
from conceptx.dictionaries import load_dictionary, saved_metadata
from conceptx.edit import Edit
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance
from conceptx.geometry import AffineDictionary, FeatureMap, SparseDictionary
from conceptx.models import DiffusionModel
from conceptx.settings import require_templates, tunable

Features = AffineDictionary | SparseDictionary
NAMES, KEPT = ("name", "synonyms"), ("retain",)


@dataclass(frozen=True)
class ItD(Eraser):
    """Turn the features of concepts round inside the text encoder, in the prompts that hold them (arXiv 2503.09446).

    A sparse autoencoder a = encode(x), x ~ D a + b reads what a block of the text encoder gives (§ 1 of docs/itd.md).
    A prompt's features are the `top` largest of its tokens' maxima. Those of the concepts' prompts that no retained
    prompt has are the concepts' own (§ 2). In T(x) = D a' + b they are multiplied by `strength`. A prompt of which
    T(x) is far enough from x is given T(x); every other keeps x bit for bit (§ 3). No weight changes, and a concept
    needs no training: the autoencoder is trained once, on captions, by `conceptx dictionary train`.

    dictionary: the folder of the autoencoder; `erase` needs it, or one in memory.
    site:       where it was trained; None: what its folder says.
    top:        n, the features of a prompt (published: 128; 256 for styles). One that is zero is never taken.
    strength:   tau_s; at 0 the features are gone, below they are turned round (published: -8).
    margin:     the threshold is this times the smallest score among the concepts' prompts that have such features.
    gate:       False: no threshold, every prompt is given T(x).
    keep_error: add the autoencoder's error back, as PISCES does: then nothing but the features changes, and a prompt
                without any has score zero (published: False).
    templates:  prompt forms of each name, erased or retained, with {} once; a score is a mean over tokens, so the
                longest prompt in which the concept is to be found should be among them.

    The concepts' prompts are their names and synonyms in the templates, and `prompts`; the retained ones the empty
    prompt, the names in `retain` in the templates, and `retain_texts`.

    A reconstruction from the authors' code and public digests of the paper. Differs from the code: the threshold is
    found with the strength and the mean over tokens that it is used with (there: with -6 for styles, and with the
    largest token for celebrities); a score counts the tokens up to the end-of-text token, not the padding, so that it
    depends on the prompt alone (there: on the others of its batch); the nudity task has a threshold (there None, with
    which nothing runs); a prompt without a feature of its own does not set the threshold; the begin token, which T(x)
    replaces too, is counted in the autoencoder's training once a prompt.
    """

    dictionary: str | None = None
    site: str | None = None
    top: int = tunable(128, 8, 512, log=True)  # n
    strength: float = tunable(-8.0, -32.0, 0.0)  # τ_s
    margin: float = 0.99
    gate: bool = True
    keep_error: bool = False
    templates: tuple[str, ...] = ("{}",)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}.")
        if not (math.isfinite(self.strength) and self.strength != 1):
            raise ValueError(f"strength must be finite and not 1, which changes nothing, got {self.strength}.")
        if not 0 < self.margin <= 1:
            raise ValueError(f"margin must lie in (0, 1], got {self.margin}.")
        require_templates(self.templates)

    def erase(
        self,
        model: DiffusionModel,
        concept: Concept | Sequence[Concept],
        *,
        seed: int = 0,
        dictionary: Features | None = None,
    ) -> Edit:
        """The edit that erases all the concepts at once: one map inside a text encoder, with the dictionary in it.

        dictionary: one in memory, of the site that is set, instead of the folder's.
        seed:       recorded, not used; nothing is drawn.
        The provenance holds the number of features, the threshold, the scores of both kinds of prompts, and how many
        retained prompts reach the threshold all the same. Prompts of the concepts that have none of the features do not
        count for the threshold; a warning names one.
        Raises ValueError when there is no concept or one twice, when what is to be erased is retained, when a prompt
        would be cut, when there is no dictionary or it does not fit the site, when no feature is the concepts' own, or
        when an edit is in force; KeyError for an unknown site; the model stays as it is.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        target, retained = self._prompts(concepts)
        model.require_whole([*target, *retained])
        site, known = self._dictionary(model, dictionary)
        skip = model.begins(site)
        states = _states(model, site, [*target, *retained])
        held = [prominent(known, x[skip:], self.top) for x in states]
        own = own_features(known.width, held[: len(target)], held[len(target) :])
        if not own.any():
            raise ValueError(
                f"Every feature of {target[0]!r} and the other prompts to be erased is one of a retained prompt too; "
                "retain less, or use another dictionary."
            )
        found = FeatureMap(known, own.nonzero()[:, 0], self.strength, skip=skip, keep_error=self.keep_error)
        scores = torch.tensor([float(found.score(x[None])) for x in states], dtype=torch.float64)
        known_by = torch.tensor([bool(own[features].any()) for features in held[: len(target)]])
        _warn_of([prompt for prompt, known in zip(target, known_by, strict=True) if not known], len(target))
        threshold = self.margin * float(scores[: len(target)][known_by].min()) if self.gate else None
        told = _told(scores[: len(target)], scores[len(target) :], threshold)
        record = provenance(self, concepts, seed, site=site, features=found.rank, threshold=threshold, **told)
        maps = {site: (replace(found, threshold=threshold),)}
        return Edit(model.text_fingerprint, maps=maps, provenance=(record,))

    def _prompts(self, concepts: Sequence[Concept]) -> tuple[list[str], list[str]]:
        """Different prompts of the concepts, and retained ones."""
        forms = {f: [t.format(n) for n in all_names(concepts, *f) for t in self.templates] for f in (NAMES, KEPT)}
        target = dict.fromkeys([*forms[NAMES], *all_names(concepts, "prompts")])
        retained = dict.fromkeys(["", *forms[KEPT], *all_names(concepts, "retain_texts")])
        if both := [prompt for prompt in target if prompt in retained]:
            raise ValueError(f"The prompt {both[0]!r} is to be erased and retained.")
        return [*target], [*retained]

    def _dictionary(self, model: DiffusionModel, given: Features | None) -> tuple[str, Features]:
        """(site, dictionary)"""
        if given is None and self.dictionary is None:
            raise ValueError(
                "ItD needs the folder of a dictionary, which this makes: "
                "conceptx dictionary train MODEL --site text_encoder.layers.N --texts FILE --out FOLDER."
            )
        site = self.site or (None if given is not None else saved_metadata(str(self.dictionary)).get("site"))
        if site is None:
            raise ValueError("The dictionary does not say at which site it was trained; set site.")
        width, known = model.width(site), given if given is not None else load_dictionary(str(self.dictionary))
        if known.dim != width:
            raise ValueError(f"The dictionary is of vectors of dimension {known.dim}, the site {site} has {width}.")
        return site, known


def prominent(dictionary: Features, states: Float[Tensor, "t d"], top: int) -> Int[Tensor, " k"]:
    """The numbers of at most `top` features: the largest of their maxima over the tokens, where positive."""
    strongest = dictionary.encode(states).amax(0)
    values, places = strongest.topk(min(top, len(strongest)))
    return places[values > 0]


def own_features(width: int, target: Sequence[Tensor], retained: Sequence[Tensor]) -> Bool[Tensor, " f"]:
    """Which of `width` features some target prompt has and no retained one, given the numbers of each prompt's."""
    own, kept = (torch.zeros(width, dtype=torch.bool) for _ in range(2))
    own[torch.cat([*target])] = True
    kept[torch.cat([*retained])] = True
    return own & ~kept


def _states(model: DiffusionModel, site: str, prompts: Sequence[str]) -> list[Tensor]:
    """(tokens, d) of each prompt, in float32 on the CPU."""
    rows = torch.cat([found[site].float().cpu() for found in model.record(prompts, [site])])
    return [*rows.split(model.lengths(prompts, site))]


def _warn_of(unknown: Sequence[str], count: int) -> None:
    if unknown:
        warnings.warn(
            f"{len(unknown)} of the {count} prompts to be erased have no feature of their own and cannot be told from "
            f"retained ones, {unknown[0]!r} among them; use another dictionary, or retain less.",
            stacklevel=3,
        )


def _told(target: Tensor, retained: Tensor, threshold: float | None) -> dict[str, Any]:
    """The least, median and largest score of either kind of prompts, and how many retained ones are changed."""
    changed = len(retained) if threshold is None else int((retained >= threshold).sum())
    kinds = (("target", target), ("retained", retained))
    return {
        "scores": {kind: [float(part.min()), float(part.median()), float(part.max())] for kind, part in kinds},
        "retained_prompts": {"all": len(retained), "changed": changed},
    }
