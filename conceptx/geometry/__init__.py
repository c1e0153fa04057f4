"""The geometry every method shares: tensors in, tensors out; float64 inside; torch only."""

from conceptx.geometry.arrays import Array
from conceptx.geometry.closed_form import WeightedRows, replacement, weighted_dual
from conceptx.geometry.dictionary import (
    AffineDictionary,
    Dictionary,
    Reconstruction,
    SparseDictionary,
    feature_change,
    reconstruction,
)
from conceptx.geometry.fantope import project_fantope, waterfill
from conceptx.geometry.feature_map import ActivationMap, FeatureMap
from conceptx.geometry.map import ConceptMap, capped
from conceptx.geometry.moments import Moments
from conceptx.geometry.ridge import DenseMetric, Metric, RetainMetric, dual
from conceptx.geometry.steer import steer
from conceptx.geometry.subspace import Subspace
from conceptx.geometry.whitening import shrink, whitening

__all__ = [
    "ActivationMap",
    "AffineDictionary",
    "Array",
    "ConceptMap",
    "DenseMetric",
    "Dictionary",
    "FeatureMap",
    "Metric",
    "Moments",
    "Reconstruction",
    "RetainMetric",
    "SparseDictionary",
    "Subspace",
    "WeightedRows",
    "capped",
    "dual",
    "feature_change",
    "project_fantope",
    "reconstruction",
    "replacement",
    "shrink",
    "steer",
    "waterfill",
    "weighted_dual",
    "whitening",
]
