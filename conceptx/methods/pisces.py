"""PISCES, Precise In-parameter Suppression for Concept Erasure (Gur-Arieh et al. 2025, arXiv 2505.22586)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Columns, Edit
from conceptx.eraser import Eraser, provenance
from conceptx.geometry import AffineDictionary, Dictionary, feature_change
from conceptx.methods import _feature_search as search
from conceptx.methods._concept_tokens import ConceptTokens, concept_tokens
from conceptx.methods._feature_search import Candidate, Feature, FeatureSearch, Recording
from conceptx.models import LanguageModel
from conceptx.settings import require_choices, tunable

logger = logging.getLogger("conceptx")
Search = Literal["contrast", "logit_lens"]
CONTRAST, ICA = "contrast", "ica"
COMPONENTS = 256  # of ICA, where the model is as wide


@dataclass(frozen=True)
class PISCES(Eraser):
    """Turn the features of a concept round inside the value vectors that hold them (arXiv 2505.22586).

    A value vector w_i is what neuron i of an MLP writes. A dictionary reads features in it: a_i = w_i . E_f. Where
    |a_i| exceeds `threshold` times the layer's largest one, the feature's coefficient is replaced by
    M `strength` s_i, against the concept, decoded, and the dictionary's error is added back, so that w_i changes by
    (new - old) D_f and by nothing else (the authors' editor; the paper itself was not at hand, this is a
    reconstruction from code and abstract, § 2 of which names the steps). No training.

    threshold:  tau.  strength: mu; M is the largest |a_i| of all chosen features of a layer.
    signed:     s_i is the majority sign of the neuron's activation where the feature is read: one that is mostly
                negative is turned the other way, one without a majority loses the feature only (authors: slightly
                better). False: s_i = 1.
    dictionary: "contrast": per layer two unit directions, the mean of what the MLP adds at tokens that name the concept
                (feature 0) and one token before (feature 1), minus that on retained texts. "ica": independent
                components of what it adds. Else a source for `load_dictionary`, with {layer} where the number stands.
    search:     "contrast": features by their activation on the concept and on retained texts; "logit_lens": by the
                concept's tokens among those that they raise or lower most (paper; finds little in small models).
    layers:     those that are searched; None: all.
    search_strength: mu while effects are measured (the authors filter with 16, whatever they edit with).
    per_layer:  candidates of a layer (by contrast).  min_match: tokens that must match (by logit lens).
    max_features: how many are edited at most; each further one must do more than the ones before.
    max_harm:   what the edit may add to the loss of a token of the retained texts, in nats.
    features:   names such as "6/0", as the search prints them: no search then.  veto: names that must not be chosen.
    texts, judged: texts of either kind that are recorded, and that effects are measured on.

    Defaults of threshold and strength are those of the authors' example (Harry Potter, Gemma 2); what else is published
    depends on a person who prunes a list. Different from the authors' code: features are chosen by what their edit
    does to the concept's own texts, not by a benchmark; where a norm stands between MLP and residual stream (Gemma 2,
    3) rows are read, and changes written, through its factors. Their extra weakening of Gemma's early layers is left
    out.
    """

    threshold: float = tunable(0.4, 0.2, 0.95)  # τ
    strength: float = tunable(36.0, 2.0, 60.0, log=True)  # μ
    signed: bool = True
    dictionary: str = CONTRAST
    search: Search = "contrast"
    layers: tuple[int, ...] | None = None
    search_strength: float = 16.0
    per_layer: int = 2
    min_match: int = 4
    max_features: int = tunable(3, 1, 4)
    max_harm: float = tunable(0.03, 0.005, 0.1, log=True)
    features: tuple[str, ...] = ()
    veto: tuple[str, ...] = ()
    texts: int = 240
    judged: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {self.threshold}: no row exceeds its own maximum.")
        if not (0 < self.strength < math.inf and 0 < self.search_strength < math.inf):
            raise ValueError("strength and search_strength must be positive and finite.")
        require_choices(self)
        if wrong := [n for n in ("per_layer", "min_match", "max_features", "texts", "judged") if getattr(self, n) < 1]:
            raise ValueError(f"{', '.join(wrong)} must be at least 1.")
        for name in (*self.features, *self.veto):
            Feature.parse(name)

    def erase(
        self,
        model: LanguageModel,
        concept: Concept,
        *,
        seed: int = 0,
        dictionaries: Mapping[int, Dictionary] | None = None,
    ) -> Edit:
        """Find the features, unless they are given, and return the change of the value vectors that hold them.

        dictionaries: layer -> dictionary of the site `layers.N.mlp_output`, instead of the one that is set.
        The provenance holds the features with their effects.
        Raises ValueError when the concept has no texts or no retain_texts, when a layer or a feature is not there,
        when no feature passes, or when an edit is in force on the model.
        """
        work = self._prepared(model, concept, seed, dictionaries)
        found = self._searched(work) if not self.features else None
        chosen = [Feature.parse(name) for name in self.features] if found is None else list(found.chosen)
        if not chosen:
            assert found is not None
            reason = ", ".join(f"{c.feature.name}: {c.verdict}" for c in found.candidates[:2]) or "no candidate"
            raise ValueError(
                f"No feature of {concept.name!r} was found among {len(found.candidates)} candidates ({reason}); "
                "allow more max_harm, a lower strength, or another dictionary."
            )
        if found is not None:
            logger.info("features %s: forgotten %.2f, harm %.3f", chosen, found.forgotten, found.harm)
        deltas = work.deltas(chosen, self.strength)
        rows = {name: delta.index.tolist() for name, delta in deltas.items()}
        effects = {} if found is None else {"forgotten": found.forgotten, "harm": found.harm}
        more = {"features": [feature.name for feature in chosen], "rows": rows, **effects}
        return Edit(model.fingerprint, deltas=deltas, provenance=(provenance(self, concept, seed, **more),))

    def find(
        self,
        model: LanguageModel,
        concept: Concept,
        *,
        seed: int = 0,
        dictionaries: Mapping[int, Dictionary] | None = None,
    ) -> FeatureSearch:
        """The search alone: every candidate, what it does, and why it was chosen or not. Errors as for `erase`."""
        return self._searched(self._prepared(model, concept, seed, dictionaries))

    def _prepared(
        self, model: LanguageModel, concept: Concept, seed: int, dictionaries: Mapping[int, Dictionary] | None
    ) -> _Work:
        self._require(concept, "texts", "retain_texts")
        self._accept(model)
        named = [Feature.parse(name).layer for name in self.features]
        layers = sorted(set(named or self.layers or dictionaries or range(model.depth)))
        if wrong := [layer for layer in layers if not 0 <= layer < model.depth]:
            raise ValueError(f"There is no layer {wrong[0]}; the model has layers 0 to {model.depth - 1}.")
        tokens = concept_tokens(model, concept)
        texts, others = (search.sampled(c, self.texts, seed) for c in (concept.texts, concept.retain_texts))
        recording = search.record(model, texts, others, tokens, layers)
        known = dict(dictionaries) if dictionaries is not None else self._dictionaries(recording, layers, seed)
        return _Work(self, model, tokens, texts, others, recording, known)

    def _dictionaries(self, recording: Recording, layers: Sequence[int], seed: int) -> dict[int, Dictionary]:
        if self.dictionary == CONTRAST:
            return {layer: contrasts(recording, layer) for layer in layers}
        from conceptx.dictionaries import ica, load_dictionary

        if self.dictionary == ICA:
            components = min(COMPONENTS, *recording.states[layers[0]].shape)
            return {layer: ica(recording.states[layer].float(), components, seed=seed) for layer in layers}
        return {layer: load_dictionary(self.dictionary.replace("{layer}", str(layer))) for layer in layers}

    def _searched(self, work: _Work) -> FeatureSearch:
        judge = search.Judge.of(work.model, work.texts, work.others, work.tokens, self.judged)

        def effect(features: Sequence[Feature]) -> tuple[int, float, float]:
            deltas = work.deltas(features, self.search_strength)
            rows = sum(len(delta.index) for delta in deltas.values())
            return rows, *judge.effect(Edit(work.model.fingerprint, deltas=deltas).applied(work.model), self.max_harm)

        candidates = [c for layer in sorted(work.dictionaries) for c in work.candidates(layer)]
        return search.choose(candidates, effect, most=self.max_features, harm=self.max_harm, veto=self.veto)


@dataclass(frozen=True, eq=False)
class _Work:
    """Everything that one erasing has at hand."""

    settings: PISCES
    model: LanguageModel
    tokens: ConceptTokens
    texts: Sequence[str]
    others: Sequence[str]
    recording: Recording
    dictionaries: Mapping[int, Dictionary]

    def candidates(self, layer: int) -> list[Candidate]:
        """The layer's features that the search looks at, with the tokens that they raise."""
        dictionary, s = self.dictionaries[layer], self.settings
        if s.search == "logit_lens":
            found = search.by_logit_lens(self.model, self.tokens, layer, dictionary, s.min_match)
        else:
            found = search.by_contrast(self.recording, layer, dictionary, s.per_layer)
        raised = partial(search.raised_tokens, self.model, dictionary=dictionary)
        return [replace(c, tokens=raised(c.feature)) for c in found]

    def deltas(self, features: Sequence[Feature], strength: float) -> dict[str, Columns]:
        """The change of each layer's value vectors. Raises ValueError for a feature that the dictionary has not."""
        by_layer: dict[int, list[Feature]] = {}
        for feature in features:
            by_layer.setdefault(feature.layer, []).append(feature)
        return {
            self.model.written(layer)[1]: self._delta(layer, mine, strength) for layer, mine in sorted(by_layer.items())
        }

    def _delta(self, layer: int, features: Sequence[Feature], strength: float) -> Columns:
        dictionary, s = self.dictionaries[layer], self.settings
        if wrong := [f.name for f in features if f.index >= dictionary.width]:
            raise ValueError(f"There is no feature {wrong[0]}; the dictionary of layer {layer} has {dictionary.width}.")
        weight = self.model.parameter(self.model.written(layer)[1])
        assert weight is not None  # only biases may be absent
        gain = self.model.mlp_gain(layer)
        signs = torch.stack([self.recording.signs[f.place][layer] for f in features], 1)
        index, change = suppress(
            weight.detach().float().cpu().T * gain,
            dictionary,
            [f.index for f in features],
            towards=torch.tensor([-1.0 if f.promotes else 1.0 for f in features])
            * (signs if s.signed else torch.ones_like(signs)),
            threshold=s.threshold,
            strength=strength,
        )
        return Columns(index, (change / gain).T.contiguous())


def contrasts(recording: Recording, layer: int) -> AffineDictionary:
    """Two unit directions: from the mean of the retained texts to that at tokens that name the concept, and one before.

    Raises ValueError when a place never occurs.
    """
    from conceptx.dictionaries import contrast

    states, retained = recording.states[layer].float(), recording.retained
    parts = [contrast(states[recording.where[place]], states[retained]) for place in search.PLACES]
    read, write = (torch.cat([getattr(p, n) for p in parts], dim) for n, dim in (("read", 1), ("write", 0)))
    return AffineDictionary(read, write, parts[0].mean)


def suppress(
    rows: Float[Tensor, "m d"],
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    towards: Float[Tensor, "m s"],
    threshold: float,
    strength: float,
) -> tuple[Int[Tensor, " r"], Float[Tensor, "r d"]]:
    """Which rows hold a feature, and by what they change: (new - old coefficient) times the directions they write.

    towards: which way the coefficient of each row and feature goes; 0: to nothing.
    new = towards strength max |row . read|, over all rows and features. The dictionary's error never enters: it is
    added back (spec § 2, step 3). Raises ValueError when no row exceeds the threshold.
    """
    reads = rows @ dictionary.read[:, list(features)].to(rows)  # a
    held = reads.abs() > threshold * reads.abs().amax(0)
    index = held.any(1).nonzero()[:, 0]
    if not len(index):
        raise ValueError(f"No value vector holds the features {list(features)}.")
    old = dictionary.encode(rows[index])[:, list(features)]
    new = reads.abs().max() * strength * towards[index]
    return index, feature_change(dictionary, old, torch.where(held[index], new, old), features)
