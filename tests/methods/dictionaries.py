"""A dictionary that is made without training."""

from collections.abc import Sequence

import torch

from conceptx.dictionaries import recorded
from conceptx.geometry import SparseDictionary
from conceptx.models import DiffusionModel


def dictionary_of_tokens(model: DiffusionModel, site: str, prompts: Sequence[str]) -> SparseDictionary:
    """Its features are the states of the prompts' tokens, which it gives back exactly, and no others."""
    states = recorded(model, prompts, site).float()
    write = torch.nn.functional.normalize(states - states.mean(0))
    return SparseDictionary(write.T, write, torch.zeros(len(write)), states.mean(0), activation="topk", k=1)
