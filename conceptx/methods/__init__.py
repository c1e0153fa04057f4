"""One paper, one file, one class. The folder is the registry; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptx.methods.elm import ELM
    from conceptx.methods.esd import ESD
    from conceptx.methods.inlp import INLP
    from conceptx.methods.leace import LEACE
    from conceptx.methods.mean_difference import MeanDifference
    from conceptx.methods.pca import PCADirections
    from conceptx.methods.rlace import RLACE
    from conceptx.methods.uce import UCE

MODULES = {
    "ELM": "elm",
    "ESD": "esd",
    "INLP": "inlp",
    "LEACE": "leace",
    "MeanDifference": "mean_difference",
    "PCADirections": "pca",
    "RLACE": "rlace",
    "UCE": "uce",
}

__all__ = ["ELM", "ESD", "INLP", "LEACE", "RLACE", "UCE", "MeanDifference", "PCADirections"]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"There is no method {name!r}; available: {', '.join(MODULES)}.")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
