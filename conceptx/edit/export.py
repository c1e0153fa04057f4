"""Edits in the formats of other libraries: LoRA adapters for `peft` and for `diffusers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from conceptx.edit.apply import check
from conceptx.edit.deltas import Delta, Dense, LowRank, as_low_rank
from conceptx.edit.host import Host
from conceptx.store import replaced_folder, save_tensors

if TYPE_CHECKING:
    from conceptx.edit.edit import Edit

LORA_FILE = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` looks for in a folder
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# diffusers reads LoRA layers of these linear layers of a CLIP text encoder, and silently leaves out all others
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def export_peft(edit: Edit, folder: Path, model: Host | None) -> None:
    """See `Edit.export_peft`. All pairs get one rank (the largest; zeros fill up) and a scaling of one."""
    from peft import LoraConfig

    if of_pipeline := [name for name in edit.deltas if name.startswith(("unet.", *(f"{e}." for e in TEXT_ENCODERS)))]:
        raise ValueError(f"{of_pipeline[0]} belongs to a pipeline of diffusers; use export_diffusers_lora.")
    pairs = _pairs(edit, model)
    state = _state(pairs, "base_model.model.")
    rank = _rank(pairs)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=sorted(pairs), task_type="CAUSAL_LM")
    config.inference_mode = True
    with replaced_folder(folder) as temporary:
        config.save_pretrained(temporary)
        save_file(state, temporary / "adapter_model.safetensors", {"format": "pt"})


def export_diffusers_lora(edit: Edit, path: Path, model: Host | None, rank: int | None) -> None:
    """See `Edit.export_diffusers_lora`. One rank as for peft: older readers scale a layer of another rank wrongly."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    pairs = _pairs(edit, model, rank, ranked=True)
    for module in pairs:
        _check_readable(module)
    path = path if path.suffix == ".safetensors" else path / LORA_FILE
    save_tensors(path, _state(pairs), {"format": "pt"})


def _check_readable(module: str) -> None:
    """Raises ValueError when `load_lora_weights` would leave the layer out."""
    component, _, inside = module.partition(".")
    if component in DENOISERS or (component in TEXT_ENCODERS and inside.rpartition(".")[2] in TEXT_LAYERS):
        return
    known = f"{', '.join(DENOISERS)} and the layers {', '.join(TEXT_LAYERS)} of {', '.join(TEXT_ENCODERS)}"
    raise ValueError(f"diffusers reads no LoRA layer at {module}; it reads those of {known}.")


def _pairs(edit: Edit, model: Host | None, rank: int | None = None, *, ranked: bool = False) -> dict[str, LowRank]:
    """module name -> LoRA pair, or a ValueError that names what is none; dense changes are cut to `rank`, if given.

    ranked: whether the caller has such an argument, for the message.
    """
    if model is not None:
        check(edit, model)
    if edit.maps:
        raise ValueError(
            f"The edit has activation maps at {sorted(edit.maps)[:3]}; fold it first, or save it as it is."
        )
    pairs = {}
    for name, delta in edit.deltas.items():
        pair = _pair(name, delta, model, rank)
        if pair is None:
            raise ValueError(_refusal(name, delta, ranked))
        pairs[name.removesuffix(".weight")] = pair
    if not pairs:
        raise ValueError("The edit changes no weight, there is nothing to export.")
    return pairs


def _refusal(name: str, delta: Delta, ranked: bool) -> str:
    dense = ranked and isinstance(delta, Dense) and delta.change.ndim == 2
    advice = "export with rank=... to keep its largest part" if dense else "save the merged model instead"
    return (
        f"The change of {name} is no low-rank change of an untied linear layer, "
        f"which is all a LoRA adapter holds; {advice}."
    )


def _pair(name: str, delta: Delta, model: Host | None, rank: int | None) -> LowRank | None:
    if rank is not None and isinstance(delta, Dense) and delta.change.ndim == 2:
        delta = _truncated(delta, rank)
    if model is None:
        return delta if isinstance(delta, LowRank) and name.endswith(".weight") else None
    return as_low_rank(delta, model.parameter_shape(name)) if model.takes_adapter(name) else None


def _truncated(delta: Dense, rank: int) -> LowRank:
    """The nearest change of that rank (Eckart and Young)."""
    u, s, v = torch.linalg.svd(delta.change.double(), full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], v[:rank])


def _rank(pairs: Mapping[str, LowRank]) -> int:
    return max(pair.down.shape[0] for pair in pairs.values())


def _state(pairs: Mapping[str, LowRank], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an adapter; pairs of a smaller rank are filled up with zeros."""
    state = {}
    for module, pair in pairs.items():
        missing = _rank(pairs) - pair.down.shape[0]
        down = torch.nn.functional.pad(pair.down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(pair.up, (0, missing))
        state[f"{prefix}{module}.lora_A.weight"] = down.float().contiguous()
        state[f"{prefix}{module}.lora_B.weight"] = up.float().contiguous()
    return state
