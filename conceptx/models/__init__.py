"""Thin wrappers around the user's own models."""

from conceptx.models.autoregressive import ARImageModel, ImagePrompts
from conceptx.models.base import Decoder, ImageModel, Model, load, wrap
from conceptx.models.diffusion import DiffusionModel
from conceptx.models.encoded import Prompts
from conceptx.models.language import LanguageModel, batches
from conceptx.models.modes import evaluating

__all__ = [
    "ARImageModel",
    "Decoder",
    "DiffusionModel",
    "ImageModel",
    "ImagePrompts",
    "LanguageModel",
    "Model",
    "Prompts",
    "batches",
    "evaluating",
    "load",
    "wrap",
]
