"""T(x) = x + D g(L(x - mu)): the one map by which every method of the library changes an activation or a vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.geometry.arrays import Array, ArrayT, finite, like, to_working, working_dtype

GATES: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda c: c, "relu": torch.relu}


@dataclass(frozen=True, eq=False)
class ConceptMap:
    """The map T(x) = x + D g(L(x - mu)) on vectors of dimension d, through k coordinates.

    write: D (d, k), what is added for each unit of a coordinate.
    read:  L (k, d), how much of each coordinate is in x.
    mean:  mu (d,), where the coordinates are zero.
    gate:  g, applied to each coordinate: "identity" or "relu" (act on positive coordinates only).

    Raises ValueError for shapes that do not fit, an unknown gate, NaN or infinity.
    """

    write: Float[Tensor, "d k"]
    read: Float[Tensor, "k d"]
    mean: Float[Tensor, " d"]
    gate: str = "identity"

    def __post_init__(self) -> None:
        d, k = self.write.shape
        if self.read.shape != (k, d) or self.mean.shape != (d,):
            shapes = [tuple(t.shape) for t in (self.write, self.read, self.mean)]
            raise ValueError(f"write, read and mean must be (d, k), (k, d) and (d,), got {shapes}.")
        if self.gate not in GATES:
            raise ValueError(f"Unknown gate {self.gate!r}; available: {sorted(GATES)}.")
        for name in ("write", "read", "mean"):
            finite(getattr(self, name), name)

    @property
    def dim(self) -> int:
        return self.write.shape[0]

    @property
    def rank(self) -> int:
        return self.write.shape[1]

    @property
    def affine(self) -> bool:
        """Whether a linear layer that reads x can absorb the map."""
        return self.gate == "identity"

    def __call__(self, x: ArrayT) -> ArrayT:
        """T(x) for x of shape (..., d); numpy or torch, same type, dtype and device out."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"The map acts on vectors of dimension {self.dim}, got {x.shape[-1]}.")
        work = to_working_with_grad(x)
        here = self.to(work.device)
        coordinates = GATES[self.gate]((work - here.mean) @ here.read.T)
        return like(work + coordinates @ here.write.T, x)

    def __mul__(self, strength: float) -> ConceptMap:
        """The same map with its change multiplied: x + strength D g(L(x - mu))."""
        return replace(self, write=self.write * strength)

    __rmul__ = __mul__

    def to(self, device: torch.device) -> ConceptMap:
        if self.write.device == device:
            return self
        dtype = working_dtype(device)
        return ConceptMap(
            self.write.to(device, dtype), self.read.to(device, dtype), self.mean.to(device, dtype), self.gate
        )

    def commutes_with(self, other: ConceptMap, tolerance: float = 1e-9) -> bool:
        """Whether applying the two in either order gives the same result up to rounding.

        For affine maps T1 T2 - T2 T1 vanishes when each writes only what the other does not read.
        """
        crossings = ((self.read, other.write), (other.read, self.write))
        return all(_overlap(read, write) <= tolerance for read, write in crossings)

    def factors(self, weight: Float[Tensor, "out d"]) -> tuple[Tensor, Tensor, Tensor]:
        """(W D, L, -W D L mu): the LoRA pair and bias shift by which a layer y = W x + b absorbs the map.

        Raises ValueError when the gate is not the identity or W does not read vectors of dimension d.
        """
        if not self.affine:
            raise ValueError(f"A map with gate {self.gate!r} is not affine and cannot be folded into a weight.")
        if weight.shape[1] != self.dim:
            raise ValueError(f"The layer reads dimension {weight.shape[1]}, the map acts on {self.dim}.")
        here = self.to(weight.device)
        up = to_working(weight) @ here.write
        return up, here.read, -up @ (here.read @ here.mean)

    def fold(self, weight: Array, bias: Array | None = None) -> tuple[Tensor, Tensor]:
        """(W', b') in the working dtype with W' x + b' = W T(x) + b for every x."""
        dense = to_working(weight)
        up, down, shift = self.factors(dense)
        return dense + up @ down, shift if bias is None else to_working(bias) + shift


def to_working_with_grad(x: Array) -> Tensor:
    """Like `to_working` but without cutting the gradient of a tensor (maps run inside a model's forward)."""
    return x.to(working_dtype(x.device)) if isinstance(x, Tensor) else to_working(x)


def _overlap(read: Tensor, write: Tensor) -> float:
    scale = float(torch.linalg.matrix_norm(read) * torch.linalg.matrix_norm(write))
    product = float(torch.linalg.matrix_norm(read @ write.to(read.device, read.dtype)))
    return product / scale if scale else 0.0
