"""A vector as a sum of directions: an affine basis, or a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import finite

ACTIVATIONS = ("relu", "jumprelu", "topk")
CHUNK = 1024  # rows whose features are held at once


@runtime_checkable
class Dictionary(Protocol):
    """Features of vectors x (..., d), and the vectors that features stand for.

    Both ways compute in the dictionary's own dtype and on its device, whatever those of the argument.
    """

    @property
    def dim(self) -> int:
        """d, of the vectors."""

    @property
    def width(self) -> int:
        """F, the number of features."""

    @property
    def read(self) -> Tensor:
        """(d, F): the direction by which each feature is read (W_enc)."""

    @property
    def write(self) -> Tensor:
        """(F, d): the direction that each feature writes (W_dec)."""

    def encode(self, x: Tensor) -> Tensor:
        """The features (..., F) of vectors (..., d)."""

    def decode(self, z: Tensor) -> Tensor:
        """The vectors (..., d) that features (..., F) stand for."""


@dataclass(frozen=True, eq=False)
class AffineDictionary:
    """z = (x - mean) read and x = z write + mean, with at most d features: ICA, PCA, a contrast of two means.

    read: (d, F).  write: (F, d).  mean: (d,).

    Where write read = 1, as in all that the library makes, to decode what was encoded is a projection.
    Raises ValueError for shapes that do not fit, more features than dimensions, NaN or infinity.
    """

    read: Tensor
    write: Tensor
    mean: Tensor

    def __post_init__(self) -> None:
        _check(self.read, self.write, mean=(self.mean, self.dim))
        if self.width > self.dim:
            raise ValueError(f"{self.width} directions in {self.dim} dimensions are not independent.")

    @property
    def dim(self) -> int:
        return self.read.shape[0]

    @property
    def width(self) -> int:
        return self.read.shape[1]

    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        return (x.to(self.read) - self.mean) @ self.read

    def decode(self, z: Float[Tensor, "*rows f"]) -> Float[Tensor, "*rows d"]:
        return z.to(self.write) @ self.write + self.mean


@dataclass(frozen=True, eq=False)
class SparseDictionary:
    """A sparse autoencoder: z = activation((x - write_bias) read + read_bias) and x = z write + write_bias.

    read:       (d, F), W_enc.  write: (F, d), W_dec.  read_bias: (F,), b_enc.  write_bias: (d,), b_dec.
    activation: "relu"; "jumprelu", what is positive and above `threshold` (F,); "topk", the k largest, where positive.
    centred:    whether write_bias is subtracted from x (sae-lens: apply_b_dec_to_input).

    Raises ValueError for shapes that do not fit, an unknown activation or one without what it needs, NaN or infinity.
    """

    read: Tensor
    write: Tensor
    read_bias: Tensor
    write_bias: Tensor
    activation: str = "relu"
    threshold: Tensor | None = None
    k: int | None = None
    centred: bool = True

    def __post_init__(self) -> None:
        _check(self.read, self.write, read_bias=(self.read_bias, self.width), write_bias=(self.write_bias, self.dim))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}; available: {', '.join(ACTIVATIONS)}.")
        if (self.threshold is None) == (self.activation == "jumprelu"):
            raise ValueError(
                f"jumprelu needs a threshold and the others have none; the activation is {self.activation}."
            )
        if self.threshold is not None:
            _check(self.read, self.write, threshold=(self.threshold, self.width))
        if (self.k is None) == (self.activation == "topk"):
            raise ValueError(f"topk needs k and the others have none; the activation is {self.activation}.")
        if self.k is not None and not 1 <= self.k <= self.width:
            raise ValueError(f"k must lie between 1 and the {self.width} features, got {self.k}.")

    @property
    def dim(self) -> int:
        return self.read.shape[0]

    @property
    def width(self) -> int:
        return self.read.shape[1]

    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        x = x.to(self.read)
        before = (x - self.write_bias if self.centred else x) @ self.read + self.read_bias
        if self.threshold is not None:
            return before.relu() * (before > self.threshold)
        if self.k is not None:
            values, places = before.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(before).scatter(-1, places, values.relu())
        return before.relu()

    def decode(self, z: Float[Tensor, "*rows f"]) -> Float[Tensor, "*rows d"]:
        return z.to(self.write) @ self.write + self.write_bias


def feature_change(
    dictionary: Dictionary,
    old: Float[Tensor, "*rows k"],
    new: Float[Tensor, "*rows k"],
    features: Sequence[int] | Tensor,
) -> Float[Tensor, "*rows d"]:
    """What a vector gains when the coefficients of some features become `new`: (new - old) write.

    Added to the vector x itself it is decode(z') + (x - decode(z)), with the dictionary's error added back; added to
    decode(z) it is decode(z').
    """
    return (new - old) @ dictionary.write[torch.as_tensor(features)].to(old)


@dataclass(frozen=True)
class Reconstruction:
    """unexplained: |x - decode(encode(x))|^2 over |x - mean|^2, both summed over all rows (FVU).
    active: the mean number of features of a row that are not zero (L0)."""

    unexplained: float
    active: float


def reconstruction(dictionary: Dictionary, x: Float[Tensor, "n d"]) -> Reconstruction:
    """How well the dictionary gives back the rows of x, and with how many features.

    Raises ValueError when x has fewer than two different rows.
    """
    mean = x.mean(0, dtype=torch.float64)
    lost = whole = active = 0.0
    for rows in x.split(CHUNK):
        z = dictionary.encode(rows)
        lost += float((dictionary.decode(z) - rows.to(z)).square().sum())
        whole += float((rows.double() - mean).square().sum())
        active += float((z != 0).sum())
    if not whole:
        raise ValueError("A reconstruction is measured on at least two different vectors.")
    return Reconstruction(lost / whole, active / len(x))


def _check(read: Tensor, write: Tensor, **vectors: tuple[Tensor, int]) -> None:
    """Shapes and finite numbers of what a dictionary holds; each vector comes with its length."""
    if write.shape != read.shape[::-1]:
        raise ValueError(f"read and write must be (d, F) and (F, d), got {tuple(read.shape)} and {tuple(write.shape)}.")
    for name, (vector, length) in vectors.items():
        if vector.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(vector.shape)}.")
        finite(vector, name)
    finite(read, "read")
    finite(write, "write")
