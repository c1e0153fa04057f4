"""A map of whole prompts: the features of a concept are scaled in a dictionary, where a prompt holds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from conceptx.geometry.dictionary import AffineDictionary, Dictionary, SparseDictionary, feature_change
from conceptx.geometry.map import ConceptMap

DICTIONARIES: dict[str, type[AffineDictionary] | type[SparseDictionary]] = {
    "affine": AffineDictionary,
    "sparse": SparseDictionary,
}


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """x becomes T(x) = D a' + b in every prompt with |T(x) - x|^2 >= threshold, and stays bit for bit x in all others.

    a = encode(x), D a + b = decode(a); a'_f = scale a_f for the named features in every token but the first `skip`,
    a' = a otherwise. |T(x) - x|^2 is the mean over channels and real tokens: a prompt that holds none of the features
    has the dictionary's error only. A prompt is judged as a whole and by itself: what stands beside it in a batch, and
    padding, does not count.

    dictionary: affine or sparse, of vectors of dimension d; it computes in its own precision.
    features:   (k,) different numbers of features.
    scale:      tau, what their coefficients are multiplied by.
    threshold:  theta; None: every prompt is changed.
    skip:       how many tokens at the beginning keep their coefficients.
    keep_error: add the dictionary's error x - decode(a) back, also in the score.
    strength:   x + strength (T(x) - x) is what a changed prompt becomes; the score is that of strength 1.

    Raises ValueError for features that the dictionary has not, and numbers that make no sense.
    """

    dictionary: AffineDictionary | SparseDictionary
    features: Int[Tensor, " k"]
    scale: float
    threshold: float | None = None
    skip: int = 1
    keep_error: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.features.ndim != 1 or self.features.dtype != torch.long or len(self.features.unique()) < self.rank:
            raise ValueError("features must be a row of different whole numbers.")
        if not self.rank or not 0 <= int(self.features.min()) <= int(self.features.max()) < self.dictionary.width:
            raise ValueError(f"features must be some of the dictionary's {self.dictionary.width}, from 0 on.")
        numbers = [self.scale, self.strength, *([] if self.threshold is None else [self.threshold])]
        if not all(map(math.isfinite, numbers)) or self.skip < 0:
            raise ValueError("scale, threshold and strength must be finite, and skip not negative.")

    @property
    def dim(self) -> int:
        return self.dictionary.dim

    @property
    def rank(self) -> int:
        """k, the number of features."""
        return len(self.features)

    @property
    def affine(self) -> bool:
        return False

    def __call__(self, x: Float[Tensor, "n t d"], real: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, "n t d"]:
        """The prompts with those changed that hold the features; same dtype and device out.

        real: which tokens are no padding (None: all).
        """
        here = self.to(x.device)
        before = x.to(here.dictionary.read.dtype)
        changed = here._changed(before)
        after = torch.lerp(before, changed, self.strength).to(x.dtype)  # exact at 0 and 1
        if self.threshold is None:
            return after
        held = _distance(changed, before, real) >= self.threshold
        return torch.where(held[:, None, None], after, x)

    def score(self, x: Float[Tensor, "n t d"], real: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, " n"]:
        """|T(x) - x|^2 of each prompt, which the threshold is compared with."""
        here = self.to(x.device)
        before = x.to(here.dictionary.read.dtype)
        return _distance(here._changed(before), before, real)

    def _changed(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"The map acts on prompts (n, tokens, {self.dim}), got {tuple(x.shape)}.")
        z = self.dictionary.encode(x)
        old = z[..., self.features]
        new = torch.cat([old[:, : self.skip], self.scale * old[:, self.skip :]], 1)
        change = feature_change(self.dictionary, old, new, self.features)
        return (x if self.keep_error else self.dictionary.decode(z)) + change

    def __mul__(self, strength: float) -> FeatureMap:
        """The same map with its change multiplied; the prompts that it changes stay the same."""
        return replace(self, strength=self.strength * strength)

    __rmul__ = __mul__

    def to(self, device: torch.device) -> FeatureMap:
        if self.dictionary.read.device == device:
            return self
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in _tensors(self.dictionary).items()}
        return replace(self, dictionary=replace(self.dictionary, **moved), features=self.features.to(device))

    def commutes_with(self, other: object) -> bool:
        """No map is known to commute with this one: each changes the score that the other is gated by."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, beside `settings`: the whole dictionary, and which features."""
        return {**_tensors(self.dictionary), "features": self.features}

    def settings(self) -> dict[str, Any]:
        """Everything that is no tensor, as JSON has it."""
        kind = next(name for name, made in DICTIONARIES.items() if isinstance(self.dictionary, made))
        mine = _others(self)
        return {**mine, "dictionary": {"kind": kind, **_others(self.dictionary)}}

    @staticmethod
    def of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FeatureMap:
        """The map of `settings` and `tensors`. Raises KeyError or TypeError when they do not fit each other."""
        mine, parts = dict(settings), dict[str, Any](tensors)
        features, described = parts.pop("features"), dict(mine.pop("dictionary"))
        dictionary = DICTIONARIES[described.pop("kind")](**parts, **described)
        return FeatureMap(dictionary, features, **mine)


ActivationMap = ConceptMap | FeatureMap


def _distance(changed: Tensor, x: Tensor, real: Tensor | None) -> Tensor:
    """The mean of the squared difference over channels and real tokens (n,)."""
    each = (changed - x).square().mean(-1)
    if real is None:
        return each.mean(1)
    counted = real.to(each)
    return (each * counted).sum(1) / counted.sum(1)


def _tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    fields = {f.name: getattr(dictionary, f.name) for f in dataclasses.fields(dictionary)}  # type: ignore[arg-type]
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _others(value: FeatureMap | AffineDictionary | SparseDictionary) -> dict[str, Any]:
    """The fields that JSON can hold."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: field for name, field in fields.items() if field is None or isinstance(field, str | int | float)}
