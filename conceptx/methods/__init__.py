"""One paper, one file, one class. The folder is the registry; names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conceptx.methods.budgeted import Budgeted
    from conceptx.methods.directional_ablation import DirectionalAblation
    from conceptx.methods.ear import EAR
    from conceptx.methods.elm import ELM
    from conceptx.methods.esd import ESD
    from conceptx.methods.inlp import INLP
    from conceptx.methods.itd import ItD
    from conceptx.methods.leace import LEACE
    from conceptx.methods.mace import MACE
    from conceptx.methods.mean_difference import MeanDifference
    from conceptx.methods.pca import PCADirections
    from conceptx.methods.pisces import PISCES
    from conceptx.methods.realera import RealEra
    from conceptx.methods.rece import RECE
    from conceptx.methods.rlace import RLACE
    from conceptx.methods.rmu import RMU
    from conceptx.methods.speed import SPEED
    from conceptx.methods.trce import TRCE
    from conceptx.methods.uce import UCE

MODULES = {
    "Budgeted": "budgeted",
    "DirectionalAblation": "directional_ablation",
    "EAR": "ear",
    "ELM": "elm",
    "ESD": "esd",
    "INLP": "inlp",
    "ItD": "itd",
    "LEACE": "leace",
    "MACE": "mace",
    "MeanDifference": "mean_difference",
    "PCADirections": "pca",
    "PISCES": "pisces",
    "RECE": "rece",
    "RLACE": "rlace",
    "RMU": "rmu",
    "RealEra": "realera",
    "SPEED": "speed",
    "TRCE": "trce",
    "UCE": "uce",
}

__all__ = [
    "EAR",
    "ELM",
    "ESD",
    "INLP",
    "LEACE",
    "MACE",
    "PISCES",
    "RECE",
    "RLACE",
    "RMU",
    "SPEED",
    "TRCE",
    "UCE",
    "Budgeted",
    "DirectionalAblation",
    "ItD",
    "MeanDifference",
    "PCADirections",
    "RealEra",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"There is no method {name!r}; available: {', '.join(MODULES)}.")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
