"""The verb of every method: `erase(model, concept) -> Edit`; array-level methods also `fit(X, z) -> Subspace`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from conceptx.geometry import Array, Subspace


class VectorEraser(ABC):
    """A method that finds a concept's subspace in labelled vectors. (erase on a language model: to be filled in)"""

    @abstractmethod
    def fit(self, X: Array, z: Array) -> Subspace:
        """The subspace of the concept z in the vectors X (n, d)."""
