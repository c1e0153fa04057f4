"""`Edit`: the one artefact. A frozen value that is applied, undone, scaled, stacked, folded, saved and exported."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conceptx.edit.apply import Applied, apply
from conceptx.edit.deltas import Delta, combine
from conceptx.edit.fold import fold
from conceptx.edit.host import Fingerprint, Host
from conceptx.geometry import ActivationMap, ConceptMap

Maps = Mapping[str, tuple[ActivationMap, ...]]


@dataclass(frozen=True, eq=False)
class Edit:
    """What a method changes in a model.

    maps:       activation maps by site name, applied in order.
    deltas:     weight changes by parameter name, in the orientation (out, in).
    generation: arguments that `model.generate` adds.
    provenance: one record for each edit stacked: method, settings, concept, seed, versions.
    host:       the fingerprint of what it was made for: the model, or the text encoders alone; `apply` refuses another.
    """

    host: Fingerprint
    maps: Maps = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    provenance: tuple[Mapping[str, Any], ...] = ()

    def apply(self, model: Host) -> Applied:
        """Change the model until `.undo()`, which puts back bit for bit what was there.

        Raises ValueError when the edit was made for another model or a shape does not fit, KeyError when a name
        does not resolve; the model is then unchanged.
        """
        return apply(self, model)

    @contextmanager
    def applied(self, model: Host) -> Iterator[Applied]:
        """`with edit.applied(model): ...` applies on entry and undoes on exit, also after an error."""
        handle = self.apply(model)
        try:
            yield handle
        finally:
            handle.undo()

    def fold(self, model: Host) -> Edit:
        """The same edit with every foldable map turned into weight changes of the layers that read its site.

        A map stays a map where its gate is not affine or where no linear layer reads the site directly.
        """
        return fold(self, model)

    def compact(self, tolerance: float = 1e-6) -> Edit:
        """Nearly the same edit in a smaller file: maps in float32 and through no more coordinates than they need.

        tolerance: see `ConceptMap.compact`. Weight changes and maps through a dictionary stay as they are.
        """
        maps = {
            site: tuple(m.compact(tolerance) if isinstance(m, ConceptMap) else m for m in maps)
            for site, maps in self.maps.items()
        }
        return replace(self, maps=maps)

    def __mul__(self, strength: float) -> Edit:
        """The edit with every change multiplied by `strength` (1: as made; 0: nothing; 0.5: half of it)."""
        strength = float(strength)
        return replace(
            self,
            maps={site: tuple(m * strength for m in maps) for site, maps in self.maps.items()},
            deltas={name: delta * strength for name, delta in self.deltas.items()},
            provenance=tuple({**p, "strength": p.get("strength", 1.0) * strength} for p in self.provenance),
        )

    __rmul__ = __mul__

    def __add__(self, other: Edit) -> Edit:
        """Both edits, this one first. Warns where the order matters; refuses edits of different models.

        Each was made without the other: at a shared site the second map acts on what the first leaves.
        """
        host = self.host | other.host
        for place in _order_matters(self, other):
            warnings.warn(f"The order of the stacked edits matters at {place}.", stacklevel=2)
        clash = {k for k, v in self.generation.items() if other.generation.get(k, v) != v}
        if clash:
            raise ValueError(f"The edits set different generation arguments {sorted(clash)}.")
        return replace(
            self,
            host=host,
            maps={s: self.maps.get(s, ()) + other.maps.get(s, ()) for s in {**self.maps, **other.maps}},
            deltas={n: _sum(self.deltas.get(n), other.deltas.get(n)) for n in {**self.deltas, **other.deltas}},
            generation={**self.generation, **other.generation},
            provenance=self.provenance + other.provenance,
        )

    def save(self, folder: str | Path) -> None:
        """Write `edit.json` and `edit.safetensors` into `folder`; an interrupted save leaves the old edit."""
        from conceptx.edit.files import save

        save(self, Path(folder))

    @staticmethod
    def load(folder: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises FileNotFoundError when there is no edit, ValueError when a file is damaged, cut off or of another
        version.
        """
        from conceptx.edit.files import load

        return load(Path(folder))

    def export_peft(self, folder: str | Path, model: Host | None = None) -> None:
        """Write a LoRA adapter that plain `peft` loads: `PeftModel.from_pretrained(base, folder)`.

        model: given, every name and shape is checked on it; changes of rows need it.
        Raises ValueError when a part of the edit is no low-rank weight change (maps: fold them first).
        """
        from conceptx.edit.export import export_peft

        export_peft(self, Path(folder), model)

    def export_diffusers_lora(self, path: str | Path, model: Host | None = None, *, rank: int | None = None) -> None:
        """Write one safetensors file that plain `diffusers` loads: `pipe.load_lora_weights(path)`.

        path:  a file that ends in .safetensors, or a folder in which the file gets the name that diffusers looks for.
        model: given, every name and shape is checked on it.
        rank:  a dense change of a linear layer is cut to this rank (its largest singular values); None: refused.
        `pipe.set_adapters([name], adapter_weights=[s])` then does what `edit * s` does.
        Raises ValueError when a part of the edit is no low-rank weight change (maps: fold them first), or changes a
        layer of which diffusers reads no LoRA.
        """
        from conceptx.edit.export import export_diffusers_lora

        export_diffusers_lora(self, Path(path), model, rank)

    def describe(self) -> str:
        """One line: what made it and how much it changes."""
        made = " + ".join(f"{p.get('method', '?')}({p.get('concept', '?')})" for p in self.provenance) or "edit"
        return f"{made}: {sum(map(len, self.maps.values()))} maps, {len(self.deltas)} weight changes"

    def __repr__(self) -> str:
        return f"<Edit {self.describe()}>"


def _sum(first: Delta | None, second: Delta | None) -> Delta:
    if first is None or second is None:
        present = first if second is None else second
        assert present is not None
        return present
    return combine(first, second)


def _order_matters(first: Edit, second: Edit) -> list[str]:
    """Sites whose maps do not commute. Weight changes are sums, which have no order."""
    return [
        f"site {site}"
        for site in first.maps.keys() & second.maps.keys()
        if not all(a.commutes_with(b) for a in first.maps[site] for b in second.maps[site])
    ]
