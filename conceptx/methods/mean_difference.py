"""Mean difference: the orthogonal projection that makes the class means equal."""

from __future__ import annotations

from dataclasses import dataclass

from conceptx.eraser import VectorEraser
from conceptx.geometry import Array, Subspace
from conceptx.geometry.arrays import matrix
from conceptx.geometry.labels import encode_labels
from conceptx.methods._span import mean_directions


@dataclass(frozen=True)
class MeanDifference(VectorEraser):
    """Mean projection: x - U U'(x - mu) with U the span of the class-mean differences (Sigma_xz for numbers).

    It guards the labels linearly like LEACE (arXiv 2306.03819, Theorem 4.1: the erased subspace contains
    Sigma_xz), as an orthogonal projection; the change of x is not the least. Known as mean projection, and as
    `orth` in the authors' LEACE code. It is also the optimum of R-LACE's game for rank k - 1.
    """

    def fit(self, X: Array, z: Array) -> Subspace:
        """The orthogonal subspace of z in X (n, d); labels and errors as for LEACE."""
        x = matrix(X, "X")
        return Subspace.orthogonal(mean_directions(x, encode_labels(z, len(x)).to(x)), x.mean(0))
