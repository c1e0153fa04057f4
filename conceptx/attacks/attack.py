"""What every attack has in common: a goal, a search, and something to generate pictures from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from conceptx.models.diffusion import DiffusionModel


@dataclass(frozen=True, eq=False)
class Goal:
    """What an attack is to bring back; an attack says which fields it needs.

    name:    what it is called, for messages and progress.
    images:  pictures of it (n, 3, h, w) in [0, 1], of the model's own size.
    prompts: prompts that called it up before the erasing.
    """

    name: str
    images: Tensor | None = None
    prompts: tuple[str, ...] = ()


class Found(Protocol):
    """The result of a search: frozen, and independent of the model it was made on."""

    def generate(self, model: DiffusionModel, *, seeds: Sequence[int], **options: Any) -> Tensor:
        """Pictures (n, 3, h, w) in [0, 1], one for each seed; options as `DiffusionModel.generate` has them."""


class Attack(Protocol):
    """A frozen dataclass of settings. A search sees the model as it is, edits in force included, and leaves it so."""

    def search(self, model: DiffusionModel, goal: Goal, *, seed: int = 0) -> Found: ...
