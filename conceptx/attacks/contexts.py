"""Text before a question: what the attacker knows of the concept, and phrases that ask for it."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass

from conceptx.attacks.attack import Attempt, Goal, MissingFromGoal
from conceptx.models import LanguageModel


@dataclass(frozen=True)
class InContext:
    """Put texts on the concept, answered questions, or a phrase (a role, an examination) before each question.

    Nothing is optimised: what such a prefix brings back is within reach of every user.

    texts:     how many of the goal's texts, drawn by the seed; 0: no such attempt.
    questions: how many of its questions, with their right answers; 0: no such attempt.
    """

    texts: int = 4
    questions: int = 4

    def __post_init__(self) -> None:
        if self.texts < 0 or self.questions < 0:
            raise ValueError(f"texts and questions must not be negative, got {self.texts} and {self.questions}.")

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """ "texts", "few-shot", and "context 1", "context 2", ... for the goal's contexts, as far as it has them.

        Raises ValueError when it has none of them.
        """
        answered = tuple(question.prompt + question.right for question in goal.questions)
        lines = {"texts": (goal.texts, self.texts), "few-shot": (answered, self.questions)}
        prefixes = {
            name: "\n".join(random.Random(f"{seed} {name}").sample(known, min(count, len(known))))
            for name, (known, count) in lines.items()
            if known and count
        }
        prefixes |= {f"context {number}": context for number, context in enumerate(goal.contexts, 1)}
        if not prefixes:
            raise MissingFromGoal(f"InContext needs texts, questions or contexts on {goal.name!r}; the goal has none.")
        for name, prefix in prefixes.items():
            yield Attempt(name, f"{prefix.rstrip()}\n")
