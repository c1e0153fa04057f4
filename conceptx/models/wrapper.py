"""What all wrappers have in common: named sites, parameters in one orientation, a fingerprint, the edits in force."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from conceptx.edit import Dense, Fingerprint, Part
from conceptx.models import parameters
from conceptx.models.sites import Site

_APPLIED: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def edits_on(module: nn.Module) -> list[Any]:
    """The edits in force on a module, the latest last: one list for all wrappers of it."""
    return _APPLIED.setdefault(module, [])


def refuse_quantised(module: Any) -> None:
    """Raises ValueError for weights that are no ordinary numbers."""
    if getattr(module.config, "quantization_config", None) is not None:
        raise ValueError("The model is quantised; load it in float32, bfloat16 or float16 to edit it.")


class Wrapper(ABC):
    """A user's model as methods see it.

    module:  its weights under one roof; parameters are named by their paths in it.
    applied: the edits in force, the latest last.
    """

    module: Any
    applied: list[Any]

    @property
    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """Every site by name, in the order in which activations pass them."""

    @property
    @abstractmethod
    def default_sites(self) -> tuple[str, ...]:
        """Where linear erasure acts unless it is told otherwise, in the order in which activations pass."""

    @property
    @abstractmethod
    def components(self) -> Mapping[str, tuple[str, nn.Module]]:
        """What the fingerprint is taken of, each with its kind."""

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Taken before the first edit and kept: of each component. Tied weights count once.

        Raises ValueError when it is asked for the first time with an edit in force.
        """
        self.require_unedited()
        parts = {name: Part.of(kind, part.named_parameters()) for name, (kind, part) in self.components.items()}
        return Fingerprint(parts)

    def require_unedited(self) -> None:
        """Raises ValueError when an edit is in force."""
        if self.applied:
            raise ValueError("An edit is in force on this model; undo it, or save the merged model and load that.")

    def site(self, name: str) -> Site:
        """The site of that name. Raises KeyError that names similar ones."""
        if name not in self.sites:
            raise KeyError(f"There is no site {name!r}; {parameters.similar(name, self.sites)}.")
        return self.sites[name]

    def readers(self, site: str) -> tuple[str, ...]:
        """The linear layers that read a site's activations directly (none: a map there cannot be folded)."""
        return self.site(site).readers

    def _read_width(self, site: str) -> int | None:
        """The dimension of the activations at a site, by the layers that read it; None where none does."""
        readers = self.readers(site)
        return self.parameter_shape(f"{readers[0]}.weight")[1] if readers else None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    # -- parameters, always (out, in) --------------------------------------------------------------------------

    def parameter(self, name: str) -> Tensor | None:
        """The live parameter as a view in (out, in); None for a bias that a linear layer has not.

        Raises KeyError that names similar parameters.
        """
        return parameters.parameter(self.module, name)

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """The shape in (out, in), also of an absent bias."""
        return parameters.parameter_shape(self.module, name)

    def add_bias(self, name: str, value: Tensor) -> None:
        parameters.add_bias(self.module, name, value)

    def drop_bias(self, name: str) -> None:
        parameters.drop_bias(self.module, name)

    def takes_adapter(self, name: str) -> bool:
        """Whether the parameter is the weight of a linear layer that shares it with no other module."""
        return parameters.takes_adapter(self.module, name)

    def bias_room(self, names: Iterable[str]) -> tuple[dict[str, bool], dict[str, Dense]]:
        """The configuration switches that make room for new biases, and zeros for the others they bring.

        Here there is no room. Raises ValueError that names the first bias, when there is one.
        """
        if new := sorted(names):
            raise ValueError(
                f"There is no place for the bias {new[0]}; erase with a zero mean instead (Subspace.linear), or save "
                "the edit as it is."
            )
        return {}, {}
