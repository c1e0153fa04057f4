"""LEACE: perfect linear concept erasure in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from conceptx.eraser import VectorEraser
from conceptx.geometry import Array, DenseMetric, Moments, Subspace, shrink
from conceptx.geometry.arrays import matrix
from conceptx.geometry.labels import encode_labels
from conceptx.methods._span import independent, standardise


@dataclass(frozen=True)
class LEACE(VectorEraser):
    """Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", arXiv 2306.03819, Theorem 4.3.

    r(x) = x - W^+ P W (x - mu) with W = Sigma_xx^-1/2 and P the projector on W Sigma_xz, that is: the basis spans
    Sigma_xz and its dual is taken in the metric Sigma_xx. Of all affine maps after which no linear predictor of z
    beats a constant, it changes x least. The rank is that of Sigma_xz, at most k - 1 for k classes.

    Differs from the authors' code: labels are standardised and the rank tolerance is a correlation (their absolute
    one leaves rare labels in place); shrinkage is off, as in the theorem; the guard on the covariance's trace is
    left out because it cannot fire; classes are encoded one-hot.

    shrinkage: shrink Sigma_xx (arXiv 1308.2608) for few rows; the guard stays exact, the change is not the least.
    """

    shrinkage: bool = False

    def fit(self, X: Array, z: Array) -> Subspace:
        """The subspace of z in X (n, d); z holds n classes or numbers, or is a matrix (n, k).

        Raises ValueError when X or z is not finite, lengths differ, z is constant or has no linear trace in X.
        """
        x = matrix(X, "X")
        return self.fit_moments(Moments.of(x, encode_labels(z, len(x)).to(x)))

    def fit_stream(self, batches: Iterable[tuple[Array, Array]]) -> Subspace:
        """The same from batches (X, z), in one pass and with memory d x d.

        z is numeric and already encoded ((n,) for one column, one-hot (n, k) for k > 2 classes), since a batch
        does not show every class.
        """
        return self.fit_moments(Moments.stream(_batch(X, z) for X, z in batches))

    def fit_moments(self, moments: Moments) -> Subspace:
        """The same from moments, for example the sum of the moments of several shards."""
        covariance, variances = moments.covariance, moments.scatter_zz.diagonal() / max(moments.count - 1, 1)
        metric = DenseMetric(shrink(covariance, moments.count) if self.shrinkage else covariance)
        columns = standardise(moments.cross_covariance, variances, moments.mean_z)
        return Subspace.oblique(independent(columns, metric.whiten(columns)), metric, moments.mean_x)


def _batch(X: Array, z: Array) -> tuple[Tensor, Tensor]:
    x = matrix(X, "X")
    columns = z if z.ndim == 2 else z[:, None]
    return x, matrix(columns, "The labels").to(x)
