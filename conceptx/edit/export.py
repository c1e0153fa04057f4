"""Edits in the formats of other libraries: a LoRA adapter for `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from conceptx.edit.apply import check
from conceptx.edit.deltas import Delta, LowRank, as_low_rank
from conceptx.edit.host import Host
from conceptx.store import replaced_folder

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit


def export_peft(edit: Edit, folder: Path, model: Host | None) -> None:
    """See `Edit.export_peft`. All pairs get one rank (the largest; zeros fill up) and a scaling of one."""
    from peft import LoraConfig

    if model is not None:
        check(edit, model)
    pairs = _pairs(edit, model)
    rank = max(pair.down.shape[0] for pair in pairs.values())
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=sorted(pairs), task_type="CAUSAL_LM")
    config.inference_mode = True
    with replaced_folder(folder) as temporary:
        config.save_pretrained(temporary)
        save_file(_state(pairs, rank), temporary / "adapter_model.safetensors", {"format": "pt"})


def _pairs(edit: Edit, model: Host | None) -> dict[str, LowRank]:
    """module name -> LoRA pair, or a ValueError that names what is none."""
    if edit.maps:
        raise ValueError(
            f"The edit has activation maps at {sorted(edit.maps)[:3]}; fold it first, or save it as it is."
        )
    pairs = {}
    for name, delta in edit.deltas.items():
        pair = _pair(name, delta, model)
        if pair is None:
            raise ValueError(
                f"The change of {name} is no low-rank change of an untied linear layer, "
                "which is all a LoRA adapter holds; save the merged model instead."
            )
        pairs[name.removesuffix(".weight")] = pair
    if not pairs:
        raise ValueError("The edit changes no weight, there is nothing to export.")
    return pairs


def _pair(name: str, delta: Delta, model: Host | None) -> LowRank | None:
    if model is None:
        return delta if isinstance(delta, LowRank) and name.endswith(".weight") else None
    return as_low_rank(delta, model.parameter_shape(name)[0]) if model.takes_adapter(name) else None


def _state(pairs: dict[str, LowRank], rank: int) -> dict[str, torch.Tensor]:
    state = {}
    for module, pair in pairs.items():
        missing = rank - pair.down.shape[0]
        down = torch.nn.functional.pad(pair.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(pair.up, (0, missing))
        state[f"base_model.model.{module}.lora_A.weight"] = down.float().contiguous()
        state[f"base_model.model.{module}.lora_B.weight"] = up.float().contiguous()
    return state
