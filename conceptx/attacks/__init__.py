"""Searches for inputs, or a little retraining, that bring an erased concept back. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptx.attacks.attack import Goal, Question
    from conceptx.attacks.contexts import InContext
    from conceptx.attacks.prompts import GreedyCoordinateGradient, SoftPrompt
    from conceptx.attacks.quantisation import Quantisation
    from conceptx.attacks.relearning import Relearning
    from conceptx.attacks.textual_inversion import TextualInversion

MODULES = {
    "Goal": "attack",
    "GreedyCoordinateGradient": "prompts",
    "InContext": "contexts",
    "Quantisation": "quantisation",
    "Question": "attack",
    "Relearning": "relearning",
    "SoftPrompt": "prompts",
    "TextualInversion": "textual_inversion",
}
LANGUAGE = {  # the name on the command line -> the class
    "relearning": "Relearning",
    "soft_prompt": "SoftPrompt",
    "discrete_prompt": "GreedyCoordinateGradient",
    "in_context": "InContext",
    "quantisation": "Quantisation",
}

__all__ = [
    "Goal",
    "GreedyCoordinateGradient",
    "InContext",
    "Quantisation",
    "Question",
    "Relearning",
    "SoftPrompt",
    "TextualInversion",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"There is no attack {name!r}; available: {', '.join(MODULES)}.")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
