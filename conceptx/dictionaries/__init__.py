"""Dictionaries: made from activations, trained, loaded, saved."""

from conceptx.dictionaries.files import load_dictionary, read_texts, save_dictionary, saved_metadata
from conceptx.dictionaries.making import contrast, ica, pca
from conceptx.dictionaries.states import recorded
from conceptx.dictionaries.training import SAETraining, TrainedDictionary, TrainingReport, train_dictionary

__all__ = [
    "SAETraining",
    "TrainedDictionary",
    "TrainingReport",
    "contrast",
    "ica",
    "load_dictionary",
    "pca",
    "read_texts",
    "recorded",
    "save_dictionary",
    "saved_metadata",
    "train_dictionary",
]
