"""A training that must not be shared out among processes."""

from __future__ import annotations

from typing import Any

import torch


def one_process(device: torch.device, method: str) -> Any:
    """An `Accelerator` that leaves everything where it is. Raises ValueError when several processes call it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False)
    if accelerator.num_processes > 1:
        raise ValueError(f"{method} trains in one process, there are {accelerator.num_processes}; start it alone.")
    return accelerator
