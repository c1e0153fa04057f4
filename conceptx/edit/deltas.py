"""Changes of one parameter, all additive and all in the orientation (out, in): `Dense`, `LowRank`,
`Rows`, `Columns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.geometry.arrays import finite


@dataclass(frozen=True, eq=False)
class Dense:
    """Adds `change`, of the parameter's own shape: (out, in) for a weight, (out,) for a bias."""

    change: Float[Tensor, ...]
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        finite(self.change, "change")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.change.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + change, computed in at least float32, in the weight's dtype."""
        return _add(weight, self.change)

    def __mul__(self, strength: float) -> Dense:
        return Dense(self.change * strength)

    def tensors(self) -> dict[str, Tensor]:
        return {"change": self.change}


@dataclass(frozen=True, eq=False)
class LowRank:
    """Adds up @ down: up (out, k), down (k, in). A LoRA pair with its scaling inside `up`."""

    up: Float[Tensor, "out k"]
    down: Float[Tensor, "k in"]
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"up (out, k) and down (k, in) do not fit: {tuple(self.up.shape)}, {tuple(self.down.shape)}."
            )
        finite(self.up, "up")
        finite(self.down, "down")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + up @ down, computed in at least float32, in the weight's dtype."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return _add(weight, self.up.to(weight.device, dtype) @ self.down.to(weight.device, dtype))

    def __mul__(self, strength: float) -> LowRank:
        return LowRank(self.up * strength, self.down)

    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}


@dataclass(frozen=True, eq=False)
class Rows:
    """Adds `change` (r, in) to the rows `index` (r,) of a weight; every row at most once."""

    index: Int[Tensor, " r"]
    change: Float[Tensor, "r in"]
    kind: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if self.change.ndim != 2 or self.index.shape != self.change.shape[:1]:
            raise ValueError(
                f"index (r,) and change (r, in) do not fit: {tuple(self.index.shape)}, {tuple(self.change.shape)}."
            )
        _check_places(self.index, "row")
        finite(self.change, "change")

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] == self.change.shape[1] and bool((self.index < shape[0]).all())

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the rows changed."""
        index = self.index.to(weight.device)
        changed = weight.clone()
        changed[index] = _add(weight[index], self.change)
        return changed

    def __mul__(self, strength: float) -> Rows:
        return Rows(self.index, self.change * strength)

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "change": self.change}


@dataclass(frozen=True, eq=False)
class Columns:
    """Adds `change` (out, r) to the columns `index` (r,) of a weight; every column at most once.

    A column of the layer that ends an MLP is what one neuron writes: its value vector.
    """

    index: Int[Tensor, " r"]
    change: Float[Tensor, "out r"]
    kind: ClassVar[str] = "columns"

    def __post_init__(self) -> None:
        if self.change.ndim != 2 or self.index.shape != self.change.shape[1:]:
            raise ValueError(
                f"index (r,) and change (out, r) do not fit: {tuple(self.index.shape)}, {tuple(self.change.shape)}."
            )
        _check_places(self.index, "column")
        finite(self.change, "change")

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and self._transposed.fits(shape[::-1])

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the columns changed."""
        return self._transposed.added_to(weight.T).T

    def __mul__(self, strength: float) -> Columns:
        return Columns(self.index, self.change * strength)

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "change": self.change}

    @property
    def _transposed(self) -> Rows:
        return Rows(self.index, self.change.T)


Delta = Dense | LowRank | Rows | Columns
DELTAS: dict[str, type[Delta]] = {cls.kind: cls for cls in (Dense, LowRank, Rows, Columns)}


def combine(first: Delta, second: Delta, shape: tuple[int, ...] | None = None) -> Delta:
    """The delta that adds both. Pairs of `LowRank` are concatenated, of `Rows` or `Columns` merged, others dense.

    Raises ValueError when the two do not fit one parameter.
    """
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        if first.shape != second.shape:
            raise ValueError(f"Deltas of shapes {first.shape} and {second.shape} do not fit one parameter.")
        ups, downs = (first.up, second.up), (first.down, second.down)
        return LowRank(torch.cat(_together(ups), 1), torch.cat(_together(downs), 0))
    if isinstance(first, Rows) and isinstance(second, Rows):
        return _merge_rows(first, second)
    if isinstance(first, Columns) and isinstance(second, Columns):
        merged = _merge_rows(first._transposed, second._transposed)
        return Columns(merged.index, merged.change.T)
    shape = shape or (first.shape if isinstance(first, Dense | LowRank) else second.shape)  # type: ignore[union-attr]
    if not (first.fits(shape) and second.fits(shape)):
        raise ValueError(f"The deltas do not both fit a parameter of shape {shape}.")
    return Dense(second.added_to(first.added_to(torch.zeros(shape, dtype=torch.float64))))


def as_low_rank(delta: Delta, shape: tuple[int, ...]) -> LowRank | None:
    """The same change as a LoRA pair for a weight of that shape, or None for a dense one."""
    if isinstance(delta, LowRank):
        return delta
    if isinstance(delta, Rows):
        return LowRank(_selector(delta.index, shape[0], delta.change.dtype).T, delta.change)
    if isinstance(delta, Columns):
        return LowRank(delta.change, _selector(delta.index, shape[1], delta.change.dtype))
    return None


def _selector(index: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(r, length) with a one in each row, at its index."""
    return torch.zeros(len(index), length, dtype=dtype).scatter_(1, index[:, None], 1)


def _check_places(index: Tensor, what: str) -> None:
    if len(index.unique()) != len(index) or (len(index) and int(index.min()) < 0):
        raise ValueError(f"The {what} numbers must be non-negative and each may appear once.")


def _merge_rows(first: Rows, second: Rows) -> Rows:
    index, place = torch.cat([first.index, second.index]).unique(return_inverse=True)
    changes = torch.cat(_together((first.change, second.change)))
    return Rows(index, torch.zeros(len(index), changes.shape[1], dtype=changes.dtype).index_add_(0, place, changes))


def _together(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return tensors[0].to(dtype), tensors[1].to(dtype)


def _add(weight: Tensor, change: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) + change.to(weight.device, dtype)).to(weight.dtype)
