"""One paper, one file, one class. The folder is the registry; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptx.methods.directional_ablation import DirectionalAblation
    from conceptx.methods.elm import ELM
    from conceptx.methods.esd import ESD
    from conceptx.methods.inlp import INLP
    from conceptx.methods.leace import LEACE
    from conceptx.methods.mean_difference import MeanDifference
    from conceptx.methods.pca import PCADirections
    from conceptx.methods.pisces import PISCES
    from conceptx.methods.rlace import RLACE
    from conceptx.methods.rmu import RMU
    from conceptx.methods.uce import UCE

MODULES = {
    "DirectionalAblation": "directional_ablation",
    "ELM": "elm",
    "ESD": "esd",
    "INLP": "inlp",
    "LEACE": "leace",
    "MeanDifference": "mean_difference",
    "PCADirections": "pca",
    "PISCES": "pisces",
    "RLACE": "rlace",
    "RMU": "rmu",
    "UCE": "uce",
}

__all__ = [
    "ELM",
    "ESD",
    "INLP",
    "LEACE",
    "PISCES",
    "RLACE",
    "RMU",
    "UCE",
    "DirectionalAblation",
    "MeanDifference",
    "PCADirections",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"There is no method {name!r}; available: {', '.join(MODULES)}.")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
