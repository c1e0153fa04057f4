"""conceptx: remove a concept from the model you already have. One geometry, one artefact, one evaluation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptx.concept import Concept, Personas
    from conceptx.edit import Edit
    from conceptx.evaluation.lm_eval import evaluate
    from conceptx.evaluation.report import Report
    from conceptx.geometry import Subspace
    from conceptx.models import load, wrap

MODULES = {
    "Concept": "concept",
    "Edit": "edit",
    "Personas": "concept",
    "Report": "evaluation.report",
    "Subspace": "geometry",
    "evaluate": "evaluation.lm_eval",
    "load": "models",
    "wrap": "models",
}

__version__ = "0.1.0"
__all__ = ["Concept", "Edit", "Personas", "Report", "Subspace", "evaluate", "load", "wrap"]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that importing the package costs nothing."""
    if name not in MODULES:
        raise AttributeError(f"module 'conceptx' has no attribute {name!r}; available: {', '.join(MODULES)}")
    return getattr(import_module(f"conceptx.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
