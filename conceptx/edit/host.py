"""What an `Edit` needs of the model it is applied to, and how it recognises that model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from conceptx.geometry import ActivationMap

WHOLE = "model"  # the only component of a language model
SAMPLES = 16  # values read from each parameter
ROUNDING = 2.0**-7  # two half-units of bfloat16, the coarsest dtype a checkpoint is loaded in


class Removable(Protocol):
    def remove(self) -> None: ...


class Host(Protocol):
    """A wrapped model. Weights are seen in the orientation (out, in) whatever the module's own."""

    applied: list[Any]  # edits in force, the latest last

    @property
    def fingerprint(self) -> Fingerprint: ...

    def parameter(self, name: str) -> Tensor | None:
        """The live parameter (a view in (out, in)); None for a bias that the layer has not but could have.

        Raises KeyError that names similar parameters.
        """

    def parameter_shape(self, name: str) -> tuple[int, ...]: ...

    def takes_adapter(self, name: str) -> bool:
        """Whether the parameter is the weight of a linear layer that shares it with no other module."""

    def add_bias(self, name: str, value: Tensor) -> None: ...

    def drop_bias(self, name: str) -> None: ...

    def width(self, site: str) -> int:
        """The dimension of the activations at a site. Raises KeyError that names what is available."""

    def readers(self, site: str) -> tuple[str, ...]:
        """The linear layers that read a site's activations directly (none: a map there cannot be folded)."""

    def install(self, site: str, concept_map: ActivationMap) -> Removable: ...


@dataclass(frozen=True, eq=False)
class Part:
    """One component of a model: its kind and parameter shapes exactly, a few weights up to bfloat16 rounding.

    structure: SHA-256 of the kind and of all parameter names and shapes.
    samples:   evenly spaced values of every parameter, float32, in the order of the names.
    """

    structure: str
    samples: Tensor

    @staticmethod
    def of(kind: str, parameters: Iterable[tuple[str, Tensor]]) -> Part:
        found = {name: (list(p.shape), sampled(p)) for name, p in parameters}  # no more than one is held
        shapes: Mapping[str, list[int]] = {name: found[name][0] for name in sorted(found)}
        structure = hashlib.sha256(json.dumps([kind, shapes]).encode()).hexdigest()
        return Part(structure, torch.cat([found[name][1] for name in shapes]))

    def mismatch(self, other: Part) -> str | None:
        """Why the other component is not this one, or None when it is."""
        if self.structure != other.structure or self.samples.shape != other.samples.shape:
            return "its architecture or parameter shapes differ"
        gap = (self.samples - other.samples).abs()
        different = gap > ROUNDING * self.samples.abs() + 1e-6
        if bool(different.any()):
            return f"{int(different.sum())} of {len(different)} sampled weights differ"
        return None


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """How a model is recognised, component by component: a language model has one, a pipeline several.

    An edit that acts on the text alone carries the text encoders only, and so applies to every pipeline that has them.
    """

    parts: Mapping[str, Part]

    def only(self, *names: str) -> Fingerprint:
        """The fingerprint of these components."""
        return Fingerprint({name: self.parts[name] for name in names})

    def mismatch(self, other: Fingerprint) -> str | None:
        """Why a model with the other fingerprint does not have all of these components, or None when it does."""
        for name, part in self.parts.items():
            if name not in other.parts:
                return f"it has no {name}"
            if reason := part.mismatch(other.parts[name]):
                return reason if self.parts.keys() == {WHOLE} else f"{name}: {reason}"
        return None

    def __or__(self, other: Fingerprint) -> Fingerprint:
        """Of a model that has the components of both. Raises ValueError when one differs, or none is common."""
        common = [name for name in self.parts if name in other.parts]
        reason = self.only(*common).mismatch(other) if common else "they have no component in common"
        if reason:
            raise ValueError(f"Edits of different models cannot be stacked: {reason}.")
        return Fingerprint({**self.parts, **other.parts})

    def digest(self) -> str:
        """A hash of all of it: the same for the same weights in the same precision."""
        parts = {name: [part.structure, part.samples.tolist()] for name, part in self.parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sampled(parameter: Tensor) -> Tensor:
    """The values of a parameter by which it is recognised."""
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()
