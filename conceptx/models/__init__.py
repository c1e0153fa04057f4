"""Thin wrappers around the user's own models."""

from conceptx.models.base import Model, load, wrap
from conceptx.models.language import LanguageModel, batches, evaluating

__all__ = ["LanguageModel", "Model", "batches", "evaluating", "load", "wrap"]
