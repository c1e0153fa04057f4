"""LoRA adapters through peft, put into a model for the length of a training and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from conceptx.edit import LowRank
from conceptx.models.language import LanguageModel
from conceptx.models.weights import Student
from conceptx.models.wrapper import Wrapper


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its rank and scaling numerator, its dropout, and the linear layers it sits on.

    modules: paths inside the model; those of a pipeline begin with the component ("unet.…").
    """

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]


def linear_modules(model: LanguageModel, layers: tuple[int, int]) -> tuple[str, ...]:
    """Paths of all linear layers in the blocks layers[0] .. layers[1] - 1.

    Raises ValueError when the range is empty or leaves the model.
    """
    first, end = layers
    if not 0 <= first < end <= model.depth:
        raise ValueError(f"The layers {first}..{end - 1} are not a range inside the model's {model.depth} layers.")
    block = model.block
    inside = (*block.attention_reads, block.attention_writes, *block.mlp_reads, block.mlp_writes)
    return tuple(f"{block.layers}.{layer}.{module}" for layer in range(first, end) for module in inside)


@contextmanager
def inserted(model: Wrapper, adapter: Adapter, seed: int) -> Iterator[Any]:
    """The peft model with a fresh adapter on the user's model; on exit the model is as it was, bit for bit.

    Inside the block the adapter is in force in the wrapped model too: `model.predict` is the student. The peft model
    of a pipeline has no `forward`, since denoiser and text encoders are called each on its own.
    Raises ValueError, before anything is changed, when a path is no linear layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    if wrong := [path for path in adapter.modules if not _is_linear(model, path)]:
        raise ValueError(f"{wrong[0]!r} is no linear layer of the model, an adapter cannot sit on it.")

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.modules),
        fan_in_fan_out=isinstance(model, LanguageModel) and model.module.config.model_type == "gpt2",
    )
    wanted_gradient = [(p, p.requires_grad) for p in model.module.parameters()]
    training = [(module, module.training) for module in model.module.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = get_peft_model(model.module, config)
    try:
        yield student
    finally:
        student.unload()
        for parameter, flag in wanted_gradient:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


@contextmanager
def adapter_in_place(model: Wrapper, adapter: Adapter, seed: int) -> Iterator[Student]:
    """A fresh adapter that is trained; the teacher is the model without it."""
    with inserted(model, adapter, seed) as module:
        yield Student(module, module.disable_adapter, lambda: low_rank_deltas(module, adapter))


def low_rank_deltas(student: Any, adapter: Adapter) -> dict[str, LowRank]:
    """The trained adapter as weight changes by parameter name, scaling inside `up`."""
    scaling = adapter.alpha / adapter.rank
    layers = {path: student.base_model.model.get_submodule(path) for path in adapter.modules}
    return {
        f"{path}.weight": LowRank(_weight(layer.lora_B).double().mul(scaling).float(), _weight(layer.lora_A).clone())
        for path, layer in layers.items()
    }


def _weight(pair: Any) -> torch.Tensor:
    return pair["default"].weight.detach().float().cpu()


def _is_linear(model: Wrapper, path: str) -> bool:
    try:
        return model.takes_adapter(f"{path}.weight")
    except KeyError:
        return False
