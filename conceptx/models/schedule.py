"""Noise levels of a diffusers scheduler, and what a denoiser's output says about a latent.

A latent at level (a, s) is x = a x0 + s e. With the usual schedules a^2 + s^2 = 1 and a^2 is `alphas_cumprod`; with
flow matching a = 1 - s. One step of DDIM (arXiv 2010.02502, eq. 12 with sigma 0) and one Euler step of the flow are
then the same formula: x' = a' x0 + s' e with the x0 and e that the denoiser predicts at x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a pipeline's scheduler knows of noise; a copy, the pipeline's own stays as it is.

    kind:   what the denoiser predicts.
    config: the scheduler's configuration.
    """

    kind: Kind
    config: dict[str, Any]

    @staticmethod
    def of(scheduler: Any) -> Schedule:
        """Raises ValueError that names the known kinds, for a scheduler of another one."""
        config = dict(scheduler.config)
        if type(scheduler).__name__.startswith("FlowMatch"):
            return Schedule("flow", config)
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample") or "beta_schedule" not in config:
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {kind!r} is an unknown kind of scheduler; known: "
                "epsilon, v_prediction and sample with a beta_schedule, and flow matching."
            )
        return Schedule(kind, config)

    def timesteps(self, steps: int, tokens: int = 0, *, even: bool = False) -> Tensor:
        """The timesteps (steps,) at which the pipeline calls its denoiser, from noise to image.

        tokens: how many patches an image has (the shift of a flow may depend on it).
        even:   whether the flow starts from evenly spaced levels (FLUX).
        """
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        if self.kind != "flow":
            scheduler = DDIMScheduler.from_config(self.config)
            scheduler.set_timesteps(steps)
            return scheduler.timesteps
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        sigmas = [1 - i * (1 - 1 / steps) / max(steps - 1, 1) for i in range(steps)] if even else None
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=self._shift(tokens))
        return scheduler.timesteps

    def _shift(self, tokens: int) -> float | None:
        if not self.config.get("use_dynamic_shifting"):
            return None
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return float(calculate_shift(tokens, *(self.config[name] for name in names)))

    def level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s), each (n, 1, 1, 1) in float32, of timesteps (n,) in the scheduler's own unit.

        Raises ValueError when a timestep lies outside the schedule, or between its steps where it has only those.
        """
        if self.kind == "flow":
            signal = 1 - timestep.float() / self.config.get("num_train_timesteps", 1000)
            return _column(signal), _column(1 - signal)
        kept = self._alphas_cumprod.to(timestep.device)
        place = timestep.long()
        if bool(((place != timestep) | (place < 0) | (place >= len(kept))).any()):
            raise ValueError(f"A timestep must be a whole number from 0 to {len(kept) - 1}, got {timestep.tolist()}.")
        return _column(kept[place].sqrt()), _column((1 - kept[place]).sqrt())

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.config).alphas_cumprod.float()

    def split(self, output: Tensor, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, e): the image and the noise that the denoiser's output means, for latents (n, c, h, w)."""
        signal, noise = self.level(timestep)
        if self.kind == "epsilon":
            return (latents - noise * output) / signal, output
        if self.kind == "v_prediction":  # v = a e - s x0
            return signal * latents - noise * output, signal * output + noise * latents
        if self.kind == "sample":
            return output, (latents - signal * output) / noise
        return latents - noise * output, latents + signal * output  # flow: v = e - x0

    def step(self, output: Tensor, latents: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """The latents at the timesteps `there`, from those at `here`."""
        clean, noise = self.split(output, latents, here)
        if self.kind != "flow" and self.config.get("clip_sample"):
            bound = self.config.get("clip_sample_range", 1.0)
            clean = clean.clamp(-bound, bound)
        signal, spread = self.level(there)
        return signal * clean + spread * noise


def _column(values: Tensor) -> Tensor:
    return values.float().reshape(-1, 1, 1, 1)


def as_timesteps(timestep: Tensor | float, count: int, device: torch.device) -> Tensor:
    """(n,) from a number or a tensor of one or n numbers."""
    found = torch.as_tensor(timestep, device=device).reshape(-1)
    return found.expand(count) if len(found) == 1 else found
