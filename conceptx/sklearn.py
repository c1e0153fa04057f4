"""Any vector eraser as a scikit-learn transformer, for pipelines and searches."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from conceptx.eraser import VectorEraser
from conceptx.methods import LEACE

FLOATS = (np.float64, np.float32)


class ConceptEraser(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Removes the concept y from X. `fit(X, y)` finds the subspace, `transform(X)` takes it out.

    eraser: a method such as LEACE(), RLACE(rank=2) or INLP() (None: LEACE()). A search goes over whole erasers:
            GridSearchCV(pipeline, {"concepteraser__eraser": [LEACE(), INLP(rounds=10)]}).

    subspace_: the fitted Subspace.

    In a Pipeline y is the target of the last step too: erase what the model is trained to predict, or fit the
    eraser on another y beforehand and let it be frozen (sklearn.frozen.FrozenEstimator).
    """

    def __init__(self, eraser: VectorEraser | None = None) -> None:
        self.eraser = eraser

    def fit(self, X: Any, y: Any) -> ConceptEraser:
        """X (n, d) and the concept labels y (n,) or (n, k). Raises ValueError as the eraser does."""
        if y is None:
            raise ValueError("ConceptEraser requires y to be passed, but the target y is None.")
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2)
        check_consistent_length(X, y)
        eraser = LEACE() if self.eraser is None else self.eraser
        self.subspace_ = eraser.fit(X, _column(y))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """X without the concept, in its own float type."""
        check_is_fitted(self)
        return self.subspace_.remove(validate_data(self, X, dtype=FLOATS, reset=False))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _column(y: Any) -> np.ndarray:
    """A single column of labels as a vector, as scikit-learn's estimators read it."""
    labels = np.asarray(y)
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
