"""Looking up and changing the parameters of a module by name, always in the orientation (out, in)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The live parameter as a view in (out, in); None for a bias that a linear layer has not.

    Raises KeyError that names similar parameters.
    """
    owner, leaf = _owner(module, name)
    live = getattr(owner, leaf)
    return live if live is None else _oriented(owner, live.data)


def oriented(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A view of a tensor of that parameter, from the module's own orientation to (out, in) or back."""
    return _oriented(_owner(module, name)[0], tensor)


def parameter_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape in (out, in), also of an absent bias."""
    owner, leaf = _owner(module, name)
    live = getattr(owner, leaf)
    return tuple(_oriented(owner, live).shape if live is not None else owner.weight.shape[:1])


def add_bias(module: nn.Module, name: str, value: Tensor) -> None:
    owner, leaf = _owner(module, name)
    setattr(owner, leaf, nn.Parameter(value.to(owner.weight.device, owner.weight.dtype), requires_grad=False))


def drop_bias(module: nn.Module, name: str) -> None:
    owner, leaf = _owner(module, name)
    setattr(owner, leaf, None)


def takes_adapter(module: nn.Module, name: str) -> bool:
    """Whether the parameter is the weight of a linear layer that shares it with no other module."""
    owner, leaf = _owner(module, name)
    linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
    every = module.named_parameters(remove_duplicate=False)
    return linear and leaf == "weight" and sum(p is owner.weight for _, p in every) == 1


def similar(name: str, names: Iterable[str]) -> str:
    """For the end of an error message: the names that resemble this one, or the first few."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    if near:
        return f"similar: {', '.join(near)}"
    return f"available: {', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    owner: Any
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    known = owner is not None and isinstance(getattr(owner, leaf, None), nn.Parameter)
    absent_bias = isinstance(owner, nn.Linear) and leaf == "bias"
    if not (known or absent_bias):
        names = (n for n, _ in module.named_parameters())
        raise KeyError(f"There is no parameter {name!r}; {similar(name, names)}.")
    return owner, leaf


def _oriented(owner: nn.Module, tensor: Tensor) -> Tensor:
    """GPT-2's Conv1D stores (in, out)."""
    return tensor.T if type(owner).__name__ == "Conv1D" and tensor.ndim == 2 else tensor
