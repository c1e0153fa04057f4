"""What every attack has in common: a goal, and a search for inputs or weights that bring the concept back."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from conceptx.models import ImageModel
    from conceptx.models.language import LanguageModel


@dataclass(frozen=True)
class Question:
    """A question with its options, as a task asks it.

    prompt:  the beginning of a text.
    options: what may follow, with the blank between them; options[answer] is right.

    Raises ValueError when there is no such option, or when it is blank.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"A question with {len(self.options)} options has no answer {self.answer}.")
        if not (self.prompt.strip() and self.right.strip()):
            raise ValueError(f"A question needs a prompt and a right answer, got {self.prompt!r} and {self.right!r}.")

    @property
    def right(self) -> str:
        """The right option."""
        return self.options[self.answer]


@dataclass(frozen=True, eq=False)
class Goal:
    """What an attack is to bring back; an attack says which fields it needs.

    name:      what it is called, for messages and progress.
    images:    pictures of it (n, 3, h, w) in [0, 1], of the model's own size.
    prompts:   prompts that called it up before the erasing.
    texts:     texts on it.
    questions: questions on it whose answers the attacker knows; never those that are scored.
    contexts:  sentences put before a question to coax it out.
    """

    name: str
    images: Tensor | None = None
    prompts: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    contexts: tuple[str, ...] = ()


class Found(Protocol):
    """The result of a search: frozen, and independent of the model it was made on."""

    def generate(self, model: ImageModel, *, seeds: Sequence[int], **options: Any) -> Tensor:
        """Pictures (n, 3, h, w) in [0, 1], one for each seed; options as the model's `generate` has them."""


class Attack(Protocol):
    """A frozen dataclass of settings. A search sees the model as it is, edits in force included, and leaves it so."""

    def search(self, model: ImageModel, goal: Goal, *, seed: int = 0) -> Found: ...


@dataclass(frozen=True)
class Attempt:
    """A state of a language model under attack.

    name:   what distinguishes it from the attack's other attempts ("epoch 2").
    prefix: what stands before every text that the model is asked; it ends in white space ("" for nothing).
    """

    name: str
    prefix: str = ""


class LanguageAttack(Protocol):
    """A frozen dataclass of settings. It sees the model as it is, edits in force included."""

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """Each attempt is in force (weights, embeddings) while it is the current one.

        Afterwards the model is bit for bit as it was, also when the iterator is closed early. Raises ValueError, before
        anything is changed, when the goal lacks what the attack needs.
        """


class MissingFromGoal(ValueError):
    """The goal has not what an attack needs."""


def needed(attack: object, goal: Goal, field: str) -> Any:
    """That field of the goal. Raises MissingFromGoal when it is empty."""
    if not (value := getattr(goal, field)):
        raise MissingFromGoal(f"{type(attack).__name__} needs {field} on {goal.name!r}; the goal has none.")
    return value
