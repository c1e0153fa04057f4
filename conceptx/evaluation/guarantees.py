"""What an edit of a pipeline does to names, from the algebra: no image is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.edit.apply import check
from conceptx.eraser import all_names, as_concepts
from conceptx.geometry.arrays import to_working
from conceptx.models import DiffusionModel
from conceptx.models.token_rows import EMPTY, Phrase, TokenRows

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Gaps:
    """Distances of a name's rows to others, as shares of the length of the others.

    last: in what all projections make of the name's last token, sqrt(sum |W' r' - W s|^2 / sum |W s|^2).
    end:  the same of the end-of-text token.
    text: of the last token's row itself, |r' - s| / |s|.
    """

    last: float
    end: float
    text: float


@dataclass(frozen=True)
class Line:
    """A name, its gaps in the edited model, and before the edit. s is of the un-edited model: the name's own row where
    it is retained (so `before` is zero), its anchor's where it is erased."""

    name: str
    anchor: str | None
    before: Gaps
    after: Gaps


@dataclass(frozen=True)
class Guarantees:
    """How far each retained name drifts, and how far each erased one is from its anchor, before and after.

    uncovered: what else the edit changes; of that none of this says anything.
    """

    retained: tuple[Line, ...]
    erased: tuple[Line, ...]
    uncovered: tuple[str, ...] = ()

    @property
    def max(self) -> float:
        """The largest drift of a retained name, of its last token."""
        return max(line.after.last for line in self.retained)

    @property
    def mean(self) -> float:
        """The mean drift of the retained names, of their last token."""
        return mean(line.after.last for line in self.retained)

    def table(self, most: int = 3) -> Table:
        """For the terminal: every erased name, the mean of the retained ones, and those that drift most."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title="By the algebra, without an image", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        for column in ("last token", "end of text", "text side"):
            table.add_column(column, justify="right", no_wrap=True)
        for line in self.erased:
            gaps = zip(_numbers(line.before), _numbers(line.after), strict=True)
            table.add_row(f"{line.name} to {_spoken(line.anchor)}", *(f"{a:.3f} → {b:.3f}" for a, b in gaps))
        every = [mean(column) for column in zip(*(_numbers(line.after) for line in self.retained), strict=True)]
        table.add_row(f"retained, mean of {len(self.retained)}", *(f"{value:.3f}" for value in every))
        for line in sorted(self.retained, key=lambda line: -line.after.last)[:most]:
            table.add_row(f"  {_spoken(line.name)}", *(f"{value:.3f}" for value in _numbers(line.after)))
        if self.uncovered:
            table.caption, table.caption_justify = f"Not covered: {'; '.join(self.uncovered)}.", "left"
        return table


def guarantees(model: DiffusionModel, edit: Edit, concept: Concept | Sequence[Concept]) -> Guarantees:
    """What the edit does to the names of these concepts: their own, and all that they retain, with the empty prompt.

    Each name is a prompt of its own. Maps and weight changes of the projections are multiplied out in float64; where
    the edit acts inside a text encoder the names are encoded with it in force.
    Raises ValueError for an edit that was made for another model or does not fit, when an edit is in force, when no
    concept is given, and for a name that the tokenizer would cut; KeyError for a name of a weight or site that is not
    there. The model stays as it is.
    """
    model.require_unedited()
    check(edit, model)
    concepts = as_concepts(concept)
    kept = [EMPTY, *((name, name) for name in all_names(concepts, "retain"))]
    anchors = [(name, name) for name in ((c.anchor or "").strip() for c in concepts)]
    pairs = [*zip(kept, kept, strict=True), *zip(((c.name, c.name) for c in concepts), anchors, strict=True)]
    gaps = _gaps(model, edit, pairs)
    lines = [
        Line(phrase[1], None if phrase is other else other[1], before, after)
        for (phrase, other), (before, after) in zip(pairs, gaps, strict=True)
    ]
    return Guarantees(tuple(lines[: len(kept)]), tuple(lines[len(kept) :]), tuple(_uncovered(model, edit)))


@torch.no_grad()
def _gaps(model: DiffusionModel, edit: Edit, pairs: Sequence[tuple[Phrase, Phrase]]) -> Iterator[tuple[Gaps, Gaps]]:
    """(before, after) of the first of each pair, to the second as it was."""
    phrases = list(dict.fromkeys(phrase for pair in pairs for phrase in pair))
    here, there = torch.tensor([[phrases.index(phrase) for phrase in pair] for pair in pairs]).T
    old, new = _rows(model, edit, phrases)
    sums = sum(_squares(*made, here, there) for made in _outputs(model, edit, old, new))
    assert isinstance(sums, Tensor)  # every pipeline has a projection
    outputs, text = ((s[:2] / s[2]).sqrt() for s in (sums, _squares(old, new, here, there)))
    for number in range(len(pairs)):
        found = torch.cat([outputs[:, number], text[:, number, :1]], 1).tolist()
        yield Gaps(*found[0]), Gaps(*found[1])


def _squares(old: Tensor, new: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """(3, pairs, 2): squared distances to where the second stood, before and after, and its squared length."""
    target = old[there]
    return torch.stack([old[here] - target, new[here] - target, target]).square().sum(-1)


def _rows(model: DiffusionModel, edit: Edit, phrases: Sequence[Phrase]) -> tuple[Tensor, Tensor]:
    """The rows (phrases, 2, d) of last and end-of-text tokens, without the edit and as the projections get them."""
    inside = any(_encodes(model, name) for name in (*edit.maps, *edit.deltas))

    def encoded() -> Tensor:
        found = TokenRows.of(model, phrases, trimmed=not inside)
        ends = [int(found.prompts.end[found.place[prompt]]) for prompt, _ in phrases]
        return torch.stack([found.block(p)[[found.last(p), end]] for p, end in zip(phrases, ends, strict=True)])

    old = new = encoded()
    if inside:
        with edit.applied(model):
            new = encoded()
    for concept_map in edit.maps.get("text", ()):
        new = concept_map(new)
    return old, new


def _outputs(model: DiffusionModel, edit: Edit, old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What each projection makes of the rows, without and with the edit; a bias that stays is left out."""
    for projection in model.projections:
        before, after = (_added(model, edit, f"{projection}.weight", changed) for changed in (False, True))
        shift = _added(model, edit, f"{projection}.bias", True) - _added(model, edit, f"{projection}.bias", False)
        yield old @ before.T, new @ after.T + shift


def _added(model: DiffusionModel, edit: Edit, name: str, changed: bool) -> Tensor:
    """A parameter in float64, with or without its change; zeros for a bias that is not there."""
    live = model.parameter(name)
    value = to_working(torch.zeros(model.parameter_shape(name), device=model.device) if live is None else live)
    return edit.deltas[name].added_to(value) if changed and name in edit.deltas else value


def _encodes(model: DiffusionModel, name: str) -> bool:
    """Whether a site or parameter lies inside a text encoder."""
    return name.partition(".")[0] in model.module and not name.startswith(f"{model.denoiser_name}.")


def _uncovered(model: DiffusionModel, edit: Edit) -> Iterator[str]:
    seen = {f"{projection}.{part}" for projection in model.projections for part in ("weight", "bias")}
    if other := [name for name in edit.deltas if name not in seen and not _encodes(model, name)]:
        yield f"changes of {len(other)} other weights of the denoiser ({other[0]}, …)"
    if sites := [site for site in edit.maps if site != "text" and not _encodes(model, site)]:
        yield f"maps at {', '.join(sites)}"
    if edit.generation:
        yield f"what is added when images are drawn ({', '.join(sorted(edit.generation))})"


def _numbers(gaps: Gaps) -> tuple[float, float, float]:
    return gaps.last, gaps.end, gaps.text


def _spoken(name: str | None) -> str:
    return name or "the empty prompt"
