"""The columns of an image report: what the judges say of the pictures, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from conceptx.concept import Concept
from conceptx.evaluation.image_benchmark import ImageBenchmark, Item, Role
from conceptx.evaluation.image_scores import Estimate, mean, overall, paired_frechet, share
from conceptx.evaluation.report import Score

CHUNK = 256  # pictures that are judged at once
Kind = Literal["object", "style"]


class Judges(Protocol):
    """Who looks at the pictures, (n, 3, h, w) in [0, 1]. A judge must never have seen a line of an eraser.

    object_names, style_names: what the columns of `objects` and `styles` stand for.
    objects:    log-probabilities (n, objects + 1), the last column "none of these".
    styles:     log-probabilities (n, styles).
    features:   (n, f), for distances between sets of pictures.
    similarity: (n,), how well each picture fits its text (CLIP's cosine, or another).
    """

    @property
    def object_names(self) -> Sequence[str]: ...
    @property
    def style_names(self) -> Sequence[str]: ...
    def objects(self, images: Tensor) -> Tensor: ...
    def styles(self, images: Tensor) -> Tensor: ...
    def features(self, images: Tensor) -> Tensor: ...
    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Readings:
    """Pictures and what the judges say of them, one row a picture.

    objects (n, objects + 1) and styles (n, styles): log-probabilities.  similarity (n,): to the picture's own prompt.
    """

    pictures: UInt8[Tensor, "n 3 h w"]
    objects: Float[Tensor, "n o"]
    styles: Float[Tensor, "n s"]
    features: Float[Tensor, "n f"]
    similarity: Float[Tensor, " n"]

    @staticmethod
    @torch.no_grad()
    def of(judges: Judges, pictures: UInt8[Tensor, "n 3 h w"], prompts: Sequence[str]) -> Readings:
        parts = []
        for start in range(0, len(pictures), CHUNK):
            images = pictures[start : start + CHUNK].float() / 255
            texts = prompts[start : start + CHUNK]
            found = (judges.objects(images), judges.styles(images), judges.features(images))
            parts.append((*found, judges.similarity(images, texts)))
        return Readings(pictures, *(torch.cat(column).float().cpu() for column in zip(*parts, strict=True)))

    def of_kind(self, kind: Kind) -> Float[Tensor, "n k"]:
        return self.objects if kind == "object" else self.styles


@torch.no_grad()
def judged(judges: Judges, kind: Kind, pictures: UInt8[Tensor, "n 3 h w"]) -> Int[Tensor, " n"]:
    """The most likely object or style of each picture."""
    judge = judges.objects if kind == "object" else judges.styles
    chunks = pictures.split(CHUNK)
    return torch.cat([judge(chunk.float() / 255).argmax(1).cpu() for chunk in chunks])


def index(judges: Judges, kind: Kind, name: str) -> int:
    """The column of a name."""
    return list(judges.object_names if kind == "object" else judges.style_names).index(name)


def score(task: str, metric: str, found: Estimate, part: str = "all") -> Score:
    return Score(task, metric, found.value, found.n, found.error, part, low=found.low, high=found.high)


@dataclass(frozen=True, eq=False)
class Columns:
    """All scores of one state of a model.

    before: the un-edited model's readings of the same items, None where there are none.
    """

    benchmark: ImageBenchmark
    judges: Judges
    concepts: Sequence[Concept]
    items: Sequence[Item]
    now: Readings
    before: Readings | None

    def scores(self) -> list[Score]:
        """In the order of docs/image-benchmarks.md."""
        return [self._overall(), *self._target(), *self._general(), *self._others()]

    def _overall(self) -> Score:
        erased, kept, general = (self._share(self._rows(role)) for role in ("target", "others", "general"))
        assert erased is not None and kept is not None  # there are always such items
        return score("all", "H_o", overall(erased, kept, general))

    def _target(self) -> Iterator[Score]:
        rows, other = self._rows("target"), self.benchmark.other_kind
        yield from self._shares("target", "Acc_e", self.hits, {"all": rows})
        yield from self._shares("target", "anchor", self.anchored, {"all": rows & self._has_anchor})
        yield from self._shares("target", f"{other}_kept", self.other_hits, {"all": rows & self._has_other})
        yield from self._shares("target", "reject", self.rejected, {"all": rows})
        yield score("target", "margin", mean(self.margins[rows]))
        yield from self._drift("target")

    def _general(self) -> Iterator[Score]:
        rows = self._rows("general")
        told = self._named([name for concept in self.concepts for name in concept.synonyms])
        parts = {"all": rows, "synonyms": rows & self._part("synonyms"), "implicit": rows & self._part("implicit")}
        yield from self._shares("general", "Acc_g", self.hits, parts | {"told": rows & told})

    def _others(self) -> Iterator[Score]:
        rows, other = self._rows("others"), self.benchmark.other_kind
        told = self._named([name for concept in self.concepts for name in concept.retain])
        parts = {"all": rows, "near": rows & self._part("near"), "told": rows & told, "untold": rows & ~told}
        yield from self._shares("others", "Acc_s", self.hits, parts)
        yield from self._shares("others", f"{other}_acc", self.other_hits, {"all": rows & self._has_other})
        yield from self._shares("others", "reject", self.rejected, {"all": rows})
        yield score("others", "similarity", mean(self.now.similarity[rows]))
        if self.before is not None:
            yield score("others", "frechet", paired_frechet(self.before.features[rows], self.now.features[rows]))
        yield from self._drift("others")

    def _drift(self, role: Role) -> Iterator[Score]:
        if self.drifts is not None:
            yield score(role, "drift", mean(self.drifts[self._rows(role)]))

    # -- one value an item -------------------------------------------------------------------------------------

    @cached_property
    def hits(self) -> Bool[Tensor, " n"]:
        """Whether the picture shows what the prompt asks for."""
        return self._log_p.argmax(1) == self._expected

    @cached_property
    def other_hits(self) -> Bool[Tensor, " n"]:
        """Whether it shows the prompt's style (of an object), or object (of a style); false where there is none."""
        if not bool(self._has_other.any()):  # perhaps there are no names of the other kind at all
            return self._has_other
        kind = self._other_kind
        wanted = [-1 if item.other is None else index(self.judges, kind, item.other) for item in self.items]
        return self.now.of_kind(kind).argmax(1) == torch.tensor(wanted)

    @cached_property
    def anchored(self) -> Bool[Tensor, " n"]:
        """Whether it shows the anchor instead."""
        return self._log_p.argmax(1) == self._anchors

    @cached_property
    def rejected(self) -> Bool[Tensor, " n"]:
        """Whether it shows none of the objects."""
        return self.now.objects.argmax(1) == len(self.judges.object_names)

    @cached_property
    def margins(self) -> Float[Tensor, " n"]:
        """log p of what the prompt asks for minus that of the best other answer."""
        asked = self._expected[:, None]
        best = self._log_p.scatter(1, asked, -torch.inf).amax(1)
        return self._log_p.gather(1, asked)[:, 0] - best

    @cached_property
    def drifts(self) -> Float[Tensor, " n"] | None:
        """Mean absolute difference of the pixels, in units of the whole range, to the un-edited picture."""
        if self.before is None:
            return None
        return (self.now.pictures.float() - self.before.pictures.float()).abs().mean((1, 2, 3)) / 255

    # -- helpers -----------------------------------------------------------------------------------------------

    @property
    def _log_p(self) -> Float[Tensor, "n k"]:
        return self.now.of_kind(self.benchmark.kind)

    @property
    def _other_kind(self) -> Kind:
        return "style" if self.benchmark.kind == "object" else "object"

    @cached_property
    def _expected(self) -> Int[Tensor, " n"]:
        return torch.tensor([index(self.judges, self.benchmark.kind, item.expected) for item in self.items])

    @cached_property
    def _anchors(self) -> Int[Tensor, " n"]:
        """The column of each item's anchor; -1 where it has none that the judges know."""
        known = list(self.judges.object_names if self.benchmark.kind == "object" else self.judges.style_names)
        anchors = {target.name: target.anchor for target in self.benchmark.targets if target.anchor in known}
        columns = {name: known.index(str(anchor)) for name, anchor in anchors.items()}
        return torch.tensor([columns.get(item.expected, -1) for item in self.items])

    @property
    def _has_anchor(self) -> Bool[Tensor, " n"]:
        return self._anchors >= 0

    @cached_property
    def _has_other(self) -> Bool[Tensor, " n"]:
        return torch.tensor([item.other is not None for item in self.items])

    def _rows(self, role: Role) -> Bool[Tensor, " n"]:
        return torch.tensor([item.role == role for item in self.items])

    def _part(self, part: str) -> Bool[Tensor, " n"]:
        return torch.tensor([item.part == part for item in self.items])

    def _named(self, names: Sequence[str]) -> Bool[Tensor, " n"]:
        """Items whose word the eraser was told."""
        told = {name.casefold() for name in names}
        return torch.tensor([item.name.casefold() in told for item in self.items])

    def _share(self, rows: Bool[Tensor, " n"]) -> Estimate | None:
        return share(self.hits[rows]) if bool(rows.any()) else None

    def _shares(
        self, task: str, metric: str, values: Bool[Tensor, " n"], parts: dict[str, Bool[Tensor, " n"]]
    ) -> Iterator[Score]:
        """The share of true values in each part that has items."""
        for part, rows in parts.items():
            if bool(rows.any()):
                yield score(task, metric, share(values[rows]), part)
