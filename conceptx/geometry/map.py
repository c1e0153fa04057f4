"""T(x) = x + D g(L(x - mu)): the one map by which every method of the library changes an activation or a vector."""

from __future__ import annotations

import math
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

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, beside the gate."""
        return {"write": self.write, "read": self.read, "mean": self.mean}

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

    def then(self, after: ConceptMap) -> ConceptMap:
        """The one map that passes x through this one and what comes out through `after`; ranks add, up to d.

        T2(T1(x)) = x + D1 L1 x + D2 L2 (I + D1 L1) x. Raises ValueError when a gate is not the identity, a mean is not
        zero, or the dimensions differ.
        """
        if not (self.affine and after.affine) or bool(self.mean.any()) or bool(after.mean.any()):
            raise ValueError("Only maps with the identity for a gate and a mean of zero compose into one map.")
        if self.dim != after.dim:
            raise ValueError(f"The maps act on dimensions {self.dim} and {after.dim}.")
        after = after.to(self.write.device)
        read = after.read + (after.read @ self.write) @ self.read
        both = capped(torch.cat([self.write, after.write], 1), torch.cat([self.read, read]))
        return ConceptMap(*both, self.mean)

    def compact(self, tolerance: float = 1e-6) -> ConceptMap:
        """Nearly the same map in float32, through no more coordinates than it needs; it still computes in float64.

        tolerance: singular values of D L up to this share of the largest are left out. A gated map keeps its
        coordinates, which the gate looks at.
        """
        write, read = self.write, self.read
        if self.affine:
            (left, up), (right, down) = torch.linalg.qr(write), torch.linalg.qr(read.T)
            u, sizes, v = torch.linalg.svd(up @ down.T)
            kept = sizes > tolerance * sizes[0]
            write, read = left @ (u[:, : len(sizes)] * sizes)[:, kept], v[: len(sizes)][kept] @ right.T
        write, read, mean = (t.float().contiguous() for t in (write, read, self.mean))
        return ConceptMap(write, read, mean, self.gate)

    def to(self, device: torch.device) -> ConceptMap:
        dtype = working_dtype(device)
        if all(t.device == device and t.dtype == dtype for t in (self.write, self.read, self.mean)):
            return self
        return ConceptMap(
            self.write.to(device, dtype), self.read.to(device, dtype), self.mean.to(device, dtype), self.gate
        )

    def commutes_with(self, other: object, tolerance: float = 1e-9) -> bool:
        """Whether applying the two in either order gives the same result, up to rounding.

        With a gate that is not affine, only maps that write nothing the other reads are known to commute; with a map of
        another kind none are.
        """
        if not isinstance(other, ConceptMap):
            return False
        here = other.to(self.write.device)
        mine, theirs = here.read @ self.write, self.read @ here.write  # what each writes into the other's coordinates
        if not (self.affine and here.affine):
            return max(_size(mine), _size(theirs)) <= tolerance * _size(self.read, here.write, here.read, self.write)
        # T1 T2 x - T2 T1 x = D1 (L1 D2) L2 (x - mu2) - D2 (L2 D1) L1 (x - mu1)
        writes = torch.cat([self.write @ theirs, -here.write @ mine], 1)
        reads = torch.cat([here.read, self.read])
        constant = writes @ torch.cat([here.read @ here.mean, self.read @ self.mean])
        linear = torch.linalg.qr(writes).R @ torch.linalg.qr(reads.T).R.T
        return max(_size(linear), _size(constant)) <= tolerance * max(_size(writes, reads), 1)

    def factors(self, weight: Float[Tensor, "out d"]) -> tuple[Tensor, Tensor, Tensor]:
        """(W D, L, -W D L mu): the LoRA pair and bias shift by which a layer y = W x + b absorbs the map.

        W D is in the weight's own precision, and at least float32: the product is the cost of folding a large model.
        Raises ValueError when the gate is not the identity or W does not read vectors of dimension d.
        """
        if not self.affine:
            raise ValueError(f"A map with gate {self.gate!r} is not affine and cannot be folded into a weight.")
        if weight.shape[1] != self.dim:
            raise ValueError(f"The layer reads dimension {weight.shape[1]}, the map acts on {self.dim}.")
        here = self.to(weight.device)
        precise = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        # from row-major D', for few columns this order of the product is up to 1.6 times faster than W D
        up = (here.write.T.to(precise).contiguous() @ weight.detach().to(precise).T).T.contiguous()
        return up, here.read, -up.to(here.read.dtype) @ (here.read @ here.mean)

    def fold(self, weight: Array, bias: Array | None = None) -> tuple[Tensor, Tensor]:
        """(W', b') in the working dtype with W' x + b' = W T(x) + b for every x."""
        dense = to_working(weight)
        up, down, shift = self.factors(dense)
        return dense + up @ down, shift if bias is None else to_working(bias) + shift


def to_working_with_grad(x: Array) -> Tensor:
    """Like `to_working` but without cutting the gradient of a tensor (maps run inside a model's forward)."""
    return x.to(working_dtype(x.device)) if isinstance(x, Tensor) else to_working(x)


def capped(up: Float[Tensor, "m k"], down: Float[Tensor, "k d"]) -> tuple[Tensor, Tensor]:
    """The same product up @ down through at most d coordinates: (up @ down, I) where k > d. Row-major, not views."""
    if len(down) <= down.shape[1]:
        return up.clone(memory_format=torch.contiguous_format), down
    return up @ down, torch.eye(down.shape[1], dtype=down.dtype, device=down.device)


def _size(*tensors: Tensor) -> float:
    """The product of the Frobenius norms."""
    return math.prod(float(torch.linalg.vector_norm(t)) for t in tensors)
