"""Thin wrappers around the user's own models."""

from conceptx.models.base import Model, load, wrap
from conceptx.models.diffusion import DiffusionModel, Prompts
from conceptx.models.language import LanguageModel, batches
from conceptx.models.modes import evaluating

__all__ = ["DiffusionModel", "LanguageModel", "Model", "Prompts", "batches", "evaluating", "load", "wrap"]
