"""The only optimisation loop: AdamW, progress, checkpoints, resume, devices and processes through accelerate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conceptx.progress import report
from conceptx.store import load_tensors, save_tensors

logger = logging.getLogger("conceptx")
Part = TypeVar("Part")
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter, beside its number of updates


def state_file(folder: str | Path | None) -> Path | None:
    """Where a training keeps its state in its checkpoint folder; None without one."""
    return None if folder is None else Path(folder) / "training.safetensors"


@dataclass(frozen=True)
class Plan:
    """How to optimise. A step's data must be a function of its number alone, so that a resumed run is the same run.

    run:        identifies settings, data and seed; a checkpoint of another run is refused.
    schedule:   the learning rate's factor as a function of the share of the steps done; None: 1 throughout.
    average:    decay of a running average of the parameters, which the student holds at the end; None: no average.
    fused:      AdamW of all parameters in one kernel: faster for a whole model, different in the last bits.
    checkpoint: a safetensors file, written every `checkpoint_every` steps and after the last; None: none.
    what:       what the progress bar says.
    """

    steps: int
    learning_rate: float
    seed: int
    run: str
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float = 1.0
    schedule: Callable[[float], float] | None = None
    average: float | None = None
    fused: bool = False
    checkpoint: Path | None = None
    checkpoint_every: int = 50
    what: str = "training"

    @staticmethod
    def bare(steps: int, learning_rate: float, *, seed: int, run: str, folder: str | Path | None = None) -> Plan:
        """Adam as most papers use it, without weight decay or clipping; its state in a checkpoint folder."""
        return Plan(steps, learning_rate, seed, run, weight_decay=0.0, gradient_clip=0.0, checkpoint=state_file(folder))


def train(
    student: nn.Module,
    parts_of: Callable[[int], Sequence[Part]],
    loss_of: Callable[[Any, Part], Tensor | None],
    plan: Plan,
    accelerator: Any,
) -> None:
    """Minimise, step by step, the sum of `loss_of(student, part)` over the parts of a step.

    A part whose loss is None teaches nothing; a step of nothing but such parts leaves parameters and optimiser alone.
    With several processes each computes its own share of every part and the gradients are averaged.
    Raises ValueError when the checkpoint belongs to another run or float16 is asked for (its gradients would need
    scaling), FloatingPointError when the loss is not finite.
    """
    for _ in training(student, parts_of, loss_of, plan, accelerator):
        pass


def training(
    student: nn.Module,
    parts_of: Callable[[int], Sequence[Part]],
    loss_of: Callable[[Any, Part], Tensor | None],
    plan: Plan,
    accelerator: Any,
) -> Generator[int, None, None]:
    """As `train`, pausing after each step with the number of steps done, so that the student can be looked at.

    Between steps nothing of the loop is in force but the student's training mode: look at it under `evaluating`. Random
    numbers drawn there change nothing of the training. An average is in the student only at the end.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError("Mixed precision in float16 is not supported; use bf16 or none.")
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimiser = _adamw(parameters, plan)
    average = None if plan.average is None else [p.detach().clone() for p in parameters]
    start = _resume(plan, named, optimiser, average)
    prepared = accelerator.prepare_model(student)
    try:
        prepared.train()
        for step in range(start, plan.steps):
            if plan.schedule is not None:
                optimiser.param_groups[0]["lr"] = plan.learning_rate * plan.schedule(step / plan.steps)
            loss = _step(prepared, parts_of(step), loss_of, plan, step, accelerator)
            if loss is not None:
                if plan.gradient_clip:
                    accelerator.clip_grad_norm_(parameters, plan.gradient_clip)
                optimiser.step()
                optimiser.zero_grad()
                _follow(average, parameters, plan.average, step)
            report(plan.what, step + 1, plan.steps, "left out" if loss is None else f"loss {loss:.4g}")
            if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
                _checkpoint(plan, named, optimiser, average, step + 1, accelerator)
            yield step + 1
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    if average is not None:
        torch._foreach_copy_([p.detach() for p in parameters], average)


def _adamw(parameters: Sequence[nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=plan.learning_rate,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        fused=plan.fused or None,
    )


def _follow(average: list[Tensor] | None, parameters: Sequence[nn.Parameter], decay: float | None, step: int) -> None:
    """One step of the running average; it forgets faster while it is young."""
    if average is not None and decay is not None:
        now = [parameter.detach() for parameter in parameters]
        torch._foreach_lerp_(average, now, 1 - min(decay, (step + 1) / (step + 10)))


def _step(
    student: Any,
    parts: Sequence[Part],
    loss_of: Callable[[Any, Part], Tensor | None],
    plan: Plan,
    step: int,
    accelerator: Any,
) -> float | None:
    """Accumulate the gradients of one step; processes exchange them once, with the last part. None: nothing learnt."""
    losses = []
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.enable_grad():
        torch.manual_seed(_mix(plan.seed, step, accelerator.process_index))
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else accelerator.no_sync(student):
                if (loss := loss_of(student, part)) is not None:
                    accelerator.backward(loss)
                    losses.append(float(loss.detach()))
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"The loss is not finite at step {step}; lower the learning rate or the guidance.")
    return sum(losses) if losses else None


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed


def _resume(
    plan: Plan,
    named: Sequence[tuple[str, nn.Parameter]],
    optimiser: torch.optim.Optimizer,
    average: Sequence[Tensor] | None,
) -> int:
    """Load the checkpoint, if there is one, and return the number of steps done."""
    if plan.checkpoint is None or not plan.checkpoint.is_file():
        return 0
    tensors = load_tensors(plan.checkpoint, expected=("run", "step"))
    run = bytes(tensors.pop("run").tolist()).decode()
    if run != plan.run:
        raise ValueError(f"{plan.checkpoint} is the checkpoint of another run; delete it or write somewhere else.")
    done = int(tensors.pop("step"))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(named):
            parameter.copy_(tensors[f"parameter:{name}"])
            if average is not None:
                average[number].copy_(tensors[f"average:{name}"])
            if (updates := f"step:{name}") in tensors:
                moments = {key: tensors[f"{key}:{name}"].to(parameter.device) for key in MOMENTS}
                optimiser.state[parameter] = {"step": tensors[updates], **moments}
    logger.info("resumed %s at step %d of %d", plan.checkpoint, done, plan.steps)
    return done


def _checkpoint(
    plan: Plan,
    named: Sequence[tuple[str, nn.Parameter]],
    optimiser: torch.optim.Optimizer,
    average: Sequence[Tensor] | None,
    done: int,
    accelerator: Any,
) -> None:
    if plan.checkpoint is None or not accelerator.is_main_process:
        return
    tensors = {"run": torch.tensor(list(plan.run.encode()), dtype=torch.uint8), "step": torch.tensor(done)}
    for number, (name, parameter) in enumerate(named):
        if average is not None:
            tensors[f"average:{name}"] = average[number]
        tensors[f"parameter:{name}"] = parameter
        tensors |= {
            f"{key}:{name}": value for key, value in optimiser.state[parameter].items()
        }  # none before an update
    save_tensors(plan.checkpoint, tensors)
