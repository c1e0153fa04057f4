"""What an `Edit` needs of the model it is applied to, and how it recognises that model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from conceptx.geometry import ConceptMap

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

    def install(self, site: str, concept_map: ConceptMap) -> Removable: ...


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """How a model is recognised: its kind and parameter shapes exactly, a few weights up to bfloat16 rounding.

    structure: SHA-256 of the model type and of all parameter names and shapes.
    samples:   evenly spaced values of every parameter, float32, in the order of the names.
    """

    structure: str
    samples: Tensor

    @staticmethod
    def of(kind: str, parameters: Iterable[tuple[str, Tensor]]) -> Fingerprint:
        named = sorted(parameters, key=lambda pair: pair[0])
        shapes: Mapping[str, list[int]] = {name: list(p.shape) for name, p in named}
        structure = hashlib.sha256(json.dumps([kind, shapes]).encode()).hexdigest()
        return Fingerprint(structure, torch.cat([_sample(p) for _, p in named]))

    def mismatch(self, other: Fingerprint) -> str | None:
        """Why the other model is not this one, or None when it is."""
        if self.structure != other.structure or self.samples.shape != other.samples.shape:
            return "its architecture or parameter shapes differ"
        gap = (self.samples - other.samples).abs()
        different = gap > ROUNDING * self.samples.abs() + 1e-6
        if bool(different.any()):
            return f"{int(different.sum())} of {len(different)} sampled weights differ"
        return None


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()
