"""Training some of a module's own weights in place; the user's tensors are set aside and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conceptx.edit import Delta, Dense
from conceptx.models.parameters import parameter


@dataclass(frozen=True)
class Student:
    """module: what is trained.  teacher: a context in which it is the frozen model.  deltas: what was learnt."""

    module: nn.Module
    teacher: Callable[[], AbstractContextManager[Any]]
    deltas: Callable[[], Mapping[str, Delta]]


@contextmanager
def weights_in_place(module: nn.Module, names: Sequence[str], prefix: str = "") -> Iterator[Student]:
    """Copies, in float32, stand in for the named parameters; on exit the module has its own tensors again.

    Nothing else is trained. The user's tensors are set aside, not copied; those of the named parameters are the
    teacher. A layer whose parameters are in half precision computes in float32 meanwhile, and gives what it gave.
    prefix: of the names of the deltas, which are in the orientation (out, in).
    """
    parameters = [module.get_parameter(name) for name in names]
    with _set_aside(module), _computing_in_float32(module, names):
        frozen = [p.data for p in parameters]
        for p in parameters:
            p.data = p.data.clone()
            p.requires_grad_(True)
        teacher = partial(_swapped, parameters, frozen)

        def deltas() -> Mapping[str, Delta]:
            learnt = _oriented(module, names)
            with teacher():
                before = _oriented(module, names)
            changes = (a - b for a, b in zip(learnt, before, strict=True))
            return {f"{prefix}{n}": Dense(c.cpu().contiguous()) for n, c in zip(names, changes, strict=True)}

        yield Student(module, teacher, deltas)


@contextmanager
def decoder_in_place(module: nn.Module, names: Sequence[str]) -> Iterator[Student]:
    """`weights_in_place` in a decoder; of one in float16 all weights are in float32 meanwhile."""
    whole = next(module.parameters()).dtype == torch.float16
    with in_float32(module) if whole else nullcontext(), weights_in_place(module, names) as student:
        yield student


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """All parameters in float32 for the length of a block; on exit the module has its own tensors again."""
    with _set_aside(module):
        for p in module.parameters():
            p.data = p.data.float()
        yield


@contextmanager
def _set_aside(module: nn.Module) -> Iterator[None]:
    """No gradients; whatever happens inside to parameters and modes, the module has the same tensors afterwards."""
    before = [(p, p.data, p.requires_grad, p.grad) for p in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    for p, *_ in before:
        p.requires_grad_(False).grad = None
    try:
        yield
    finally:
        for p, data, flag, gradient in before:
            p.grad = None
            p.data = data
            p.requires_grad_(flag).grad = gradient
        for part, mode in modes:
            part.training = mode


@contextmanager
def _computing_in_float32(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The layers that own the parameters, where those are in half precision, compute in float32 between casts."""
    owners = {name.rpartition(".")[0]: module.get_parameter(name).dtype for name in names}
    hooks = []
    for path, dtype in owners.items():
        if dtype == torch.float32:
            continue
        owner = module.get_submodule(path)
        for p in owner.parameters(recurse=False):
            p.data = p.data.float()
        hooks.append(owner.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:])))
        hooks.append(owner.register_forward_hook(partial(_cast_back, dtype)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cast_back(dtype: torch.dtype, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    return out.to(dtype)


def _oriented(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    found = (parameter(module, name) for name in names)
    return [tensor for tensor in found if tensor is not None]


@contextmanager
def _swapped(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Iterator[None]:
    """The tensors in the place of the parameters' own; no number is copied."""
    own = [p.data for p in parameters]
    _point(parameters, tensors)
    try:
        yield
    finally:
        _point(parameters, own)


def _point(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> None:
    for p, tensor in zip(parameters, tensors, strict=True):
        p.data = tensor
