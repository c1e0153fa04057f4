"""What an edit of UCE was solved from, concept by concept, so that concepts come and go without solving anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit, Fingerprint, Part
from conceptx.eraser import all_names, as_concepts, check_roles, provenance
from conceptx.geometry import WeightedRows
from conceptx.geometry.running import RunningSolve
from conceptx.methods.uce import UCE
from conceptx.models import DiffusionModel
from conceptx.store import load_beside, load_index, save_indexed

INDEX = "ledger.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """A concept, the token rows that are erased of it (k, d), and the rows (k, d) that they become."""

    concept: Concept
    keys: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Ledger:
    """An edit of UCE, open: every verb returns another ledger, and `edit()` is what `erase` makes of its concepts.

        ledger = UCE().open(model, concepts)
        ledger.add(model, Concept("dog", anchor="cat")).remove("owl").edit()

    The solve is updated for the rows that change alone (`RunningSolve`): the keys of the concept, the rows of retained
    names that no other concept retains, and, where the weight of retained rows follows from their number (up to ten
    names), that of all of them. Of a large text encoder it takes several megabytes; the edit does not need it.

    eraser:   the settings, form "replace" or "moderate".
    host:     the text encoders it was made for.
    solve:    M^-1 and N of all rows.
    entries:  the concepts.
    retained: the rows of each retained prompt, once; "" is the empty one.
    """

    eraser: UCE
    host: Fingerprint
    solve: RunningSolve
    entries: tuple[Entry, ...] = ()
    retained: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(eraser: UCE, model: DiffusionModel, concepts: Sequence[Concept]) -> Ledger:
        """See `UCE.open`."""
        eraser._accept(model)
        if eraser.form not in ("replace", "moderate"):
            raise ValueError(f"The form {eraser.form!r} has targets of its own in every layer and cannot stay open.")
        solve = RunningSolve.start(model.width("text"), eraser.ridge)
        return Ledger(eraser, model.text_fingerprint, solve).add(model, concepts)

    @property
    def concepts(self) -> list[Concept]:
        return [entry.concept for entry in self.entries]

    def add(self, model: DiffusionModel, concept: Concept | Sequence[Concept]) -> Ledger:
        """With these concepts too, and with what they retain.

        Raises ValueError when the model has other text encoders or an edit in force, when a concept is there already,
        or when what is to be erased is retained or an anchor, of the old ones or the new; the model stays as it is.
        """
        self.eraser._accept(model)
        if reason := self.host.mismatch(model.fingerprint):
            raise ValueError(f"The ledger was made for another model: {reason}.")
        new = as_concepts(concept)
        check_roles([*self.concepts, *new])
        names = [name for name in ["", *all_names(new, "retain")] if name not in self.retained]
        entries, rows = self._encoded(model, new, names)
        solve = self._retaining({**self.retained, **rows})
        for entry in entries:
            solve = solve.add(self._keys(entry), entry.targets)
        every = (*self.entries, *entries)
        return replace(self, solve=solve, entries=every, retained={**self.retained, **rows})

    def remove(self, name: str) -> Ledger:
        """Without the concept of this name, and without what it alone retains.

        Raises KeyError that names the concepts there are.
        """
        gone = next((entry for entry in self.entries if entry.concept.name.casefold() == name.casefold()), None)
        if gone is None:
            raise KeyError(f"There is no concept {name!r} in the ledger; it holds {_listed(self.concepts)}.")
        entries = tuple(entry for entry in self.entries if entry is not gone)
        names = ["", *all_names([entry.concept for entry in entries], "retain")]
        retained = {name: rows for name, rows in self.retained.items() if name in names}
        solve = self._retaining(retained).remove(self._keys(gone), gone.targets)
        return replace(self, solve=solve, entries=entries, retained=retained)

    def edit(self, *, seed: int = 0) -> Edit:
        """The edit of all concepts in it. seed: recorded, not used. Raises ValueError when there is none."""
        if not self.entries:
            raise ValueError("The ledger holds no concept.")
        record = provenance(self.eraser, self.concepts, seed, beta=self.eraser.beta(len(self.retained)))
        return Edit(self.host, maps={"text": (self.solve.map(),)}, provenance=(record,))

    def _encoded(
        self, model: DiffusionModel, concepts: Sequence[Concept], names: Sequence[str]
    ) -> tuple[list[Entry], dict[str, Tensor]]:
        """The rows of new concepts and of newly retained names."""
        pairs = [[*self.eraser.pairs(concept)] for concept in concepts]
        flat = [pair for mine in pairs for pair in mine]
        blocks, rows = self.eraser.rows(model, flat, [(name, name) for name in names])
        parts = iter(blocks)
        entries = []
        for concept, mine in zip(concepts, pairs, strict=True):
            keys, targets = zip(*(next(parts) for _ in mine), strict=True)
            entries.append(Entry(concept, torch.cat(keys), torch.cat(targets)))
        return entries, dict(zip(names, rows, strict=True))

    def _keys(self, entry: Entry) -> WeightedRows:
        return WeightedRows.of(entry.keys, self.eraser.erase_weight)

    def _retaining(self, retained: Mapping[str, Tensor]) -> RunningSolve:
        """The solve with these retained rows instead of those it has; all weigh the same, by their number."""
        rows = {**self.retained, **retained}
        shifts = {
            name: self.eraser.beta(len(retained)) * (name in retained)
            - (self.eraser.beta(len(self.retained)) if name in self.retained else 0)
            for name in rows
        }
        solve = self.solve
        for verb, sign in ((RunningSolve.retain, 1), (RunningSolve.release, -1)):
            if moved := [name for name in rows if sign * shifts[name] > 0]:
                weights = [torch.full_like(rows[name][:, 0], sign * shifts[name]) for name in moved]
                solve = verb(solve, WeightedRows(torch.cat([rows[name] for name in moved]), torch.cat(weights)))
        return solve

    # -- on disk -----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `ledger.json` and one safetensors file, beside an edit or by themselves; `edit().save` writes the edit.

        An interrupted save leaves the old ledger whole.
        """
        save_indexed(Path(folder), "ledger", self._tensors(), self._index)

    @staticmethod
    def load(folder: str | Path) -> Ledger:
        """Read what `save` wrote.

        Raises FileNotFoundError when there is no ledger, ValueError when a file is damaged, cut off or of another
        version.
        """
        path = Path(folder) / INDEX
        index = load_index(path, _Index, "a ledger")
        tensors = {name: tensor.double() for name, tensor in load_beside(path, index.tensors, "ledger").items()}
        try:
            parts = {part: Part(how, tensors[f"fingerprint:{part}"].float()) for part, how in index.host.items()}
            entries = tuple(
                Entry(Concept(**fields), tensors[f"keys:{number}"], tensors[f"targets:{number}"])
                for number, fields in enumerate(index.concepts)
            )
            retained = {name: tensors[f"retained:{number}"] for number, name in enumerate(index.retained)}
            solve = RunningSolve(tensors["inverse"], tensors["moved"], sum(len(entry.keys) for entry in entries))
        except KeyError as error:
            raise ValueError(f"{path.parent / index.tensors} does not hold what {INDEX} says: {error}.") from None
        return Ledger(UCE.from_settings(index.settings), Fingerprint(parts), solve, entries, retained)

    def _index(self, tensors: str) -> _Index:
        return _Index(
            format="conceptx-ledger",
            version=1,
            tensors=tensors,
            host={part: found.structure for part, found in self.host.parts.items()},
            settings=dataclasses.asdict(self.eraser),
            concepts=[concept.model_dump(mode="json") for concept in self.concepts],
            retained=list(self.retained),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Rows in the precision in which they were encoded, the solve in float64."""
        rows = {f"retained:{number}": block for number, block in enumerate(self.retained.values())}
        for number, entry in enumerate(self.entries):
            rows |= {f"keys:{number}": entry.keys, f"targets:{number}": entry.targets}
        samples = {f"fingerprint:{name}": part.samples for name, part in self.host.parts.items()}
        solve = {"inverse": self.solve.inverse, "moved": self.solve.moved}
        return samples | solve | {name: _exact(block) for name, block in rows.items()}


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["conceptx-ledger"]
    version: Literal[1]
    tensors: str
    host: dict[str, str]  # component -> structure
    settings: dict[str, Any]
    concepts: list[dict[str, Any]]
    retained: list[str]


def _exact(rows: Tensor) -> Tensor:
    """In float32 where that loses nothing."""
    small = rows.float()
    return small if torch.equal(small.double(), rows) else rows


def _listed(concepts: Sequence[Concept], most: int = 8) -> str:
    names = [concept.name for concept in concepts]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "") or "none"
