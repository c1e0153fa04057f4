"""Is a concept gone from an image model, and are the others kept? The scores of an `ImageBenchmark`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from conceptx.attacks.attack import Attack, Goal
from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.edit.apply import check
from conceptx.edit.host import Fingerprint
from conceptx.evaluation.image_benchmark import ImageBenchmark, Item
from conceptx.evaluation.image_columns import Columns, Judges, Readings, index, judged, score
from conceptx.evaluation.image_scores import share
from conceptx.evaluation.report import Report, Score

if TYPE_CHECKING:
    from conceptx.models import ImageModel

CHUNK = 256  # pictures that are held as float at once
LEAST_OTHERS = 4  # pictures of other names below which a Fréchet distance has no interval


@dataclass
class Unedited:
    """What the un-edited model draws, remembered so that each picture is drawn once.

    Hand one to all evaluations of a model: of other edits, or of other concepts of the same benchmark.
    """

    _host: Fingerprint | None = None
    _drawn: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    _recovered: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def pictures(self, model: ImageModel, benchmark: ImageBenchmark, items: Sequence[Item]) -> UInt8[Tensor, "n 3 h w"]:
        """Raises ValueError when an edit is in force on the model, or it is not the model of the first call."""
        self._recognise(model)
        keys = [(item.prompt, item.seed, benchmark.steps, benchmark.guidance) for item in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._drawn}
        if missing:
            self._drawn |= dict(zip(missing, draw(model, benchmark, list(missing.values())), strict=True))
        return torch.stack([self._drawn[key] for key in keys])

    def recovered(
        self, model: ImageModel, benchmark: ImageBenchmark, attack: Attack, seed: int, goal: Goal
    ) -> UInt8[Tensor, "n 3 h w"]:
        """Pictures after the attack, likewise."""
        self._recognise(model)
        key = (attack, seed, goal.name, benchmark.images, benchmark.seed, benchmark.steps, benchmark.guidance)
        if key not in self._recovered:
            self._recovered[key] = recover(model, benchmark, attack, seed, goal)
        return self._recovered[key]

    def _recognise(self, model: ImageModel) -> None:
        model.require_unedited()
        self._host = self._host or model.fingerprint
        if reason := self._host.mismatch(model.fingerprint):
            raise ValueError(f"The remembered pictures are another model's: {reason}.")


def draw(model: ImageModel, benchmark: ImageBenchmark, items: Sequence[Item]) -> UInt8[Tensor, "n 3 h w"]:
    """The pictures of the items in 8 bits, as a file would hold them, by the model as it is."""
    parts = []
    for start in range(0, len(items), CHUNK):
        chunk = items[start : start + CHUNK]
        prompts, seeds = [item.prompt for item in chunk], [item.seed for item in chunk]
        parts.append(_bits(model.generate(prompts, seeds=seeds, **benchmark.sampler)))
    return torch.cat(parts)


def recover(
    model: ImageModel, benchmark: ImageBenchmark, attack: Attack, seed: int, goal: Goal
) -> UInt8[Tensor, "n 3 h w"]:
    """Attack the model as it is and draw `benchmark.images` pictures from what was found."""
    found = attack.search(model, goal, seed=seed)
    seeds = range(benchmark.seed, benchmark.seed + benchmark.images)
    return _bits(found.generate(model, seeds=seeds, **benchmark.sampler))


def _bits(images: Float[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


# -- the evaluation --------------------------------------------------------------------------------------------


def evaluate_images(
    model: ImageModel,
    benchmark: ImageBenchmark,
    judges: Judges,
    concept: Concept | Sequence[Concept],
    *,
    edit: Edit | None = None,
    unedited: Unedited | None = None,
    attack: Attack | None = None,
    examples: Callable[[str], Tensor] | None = None,
    seed: int = 0,
) -> Report:
    """Score the model on the concepts that were erased; with an edit, apply it in memory and score both states.

    Without an edit the model is scored as it is, and what needs the un-edited pictures (Fréchet distance, drift) is
    left out.  docs/image-benchmarks.md says what each score means.

    concept:  the concepts that the edit erases, as they were given to the eraser.
    unedited: pictures of the un-edited model from earlier calls; None: they are drawn here.
    attack:   with `examples` (pictures (m, 3, h, w) of a name), a search with `seed` on each erased name and on the
              benchmark's unrelated one, on both states of the model.

    Raises ValueError, before anything is drawn: no entry of the benchmark for a concept, a prompt that the concept was
    erased with, a name unknown to the judges, fewer than four pictures of others, an edit for another model, an edit in
    force beside the one given.
    """
    concepts = (concept,) if isinstance(concept, Concept) else tuple(concept)
    case = _Case(benchmark, judges, concepts, benchmark.items(concepts), attack, examples, seed)
    case.check()
    if edit is None:
        return case.report(model, draw, recover, None)
    model.require_unedited()
    check(edit, model)
    known = Unedited() if unedited is None else unedited
    before = case.read(known.pictures(model, benchmark, case.items))
    reference = case.report(model, known.pictures, known.recovered, before)
    with edit.applied(model):
        return case.report(model, draw, recover, before).beside(reference)


@dataclass(frozen=True)
class _Case:
    """One evaluation: everything but the model."""

    benchmark: ImageBenchmark
    judges: Judges
    concepts: tuple[Concept, ...]
    items: tuple[Item, ...]
    attack: Attack | None
    examples: Callable[[str], Tensor] | None
    seed: int

    def check(self) -> None:
        """Everything that can be wrong before a picture is drawn."""
        for kind, names, known in (
            ("object", self.benchmark.objects, self.judges.object_names),
            ("style", self.benchmark.styles, self.judges.style_names),
        ):
            if missing := [name for name in names if name not in known]:
                raise ValueError(f"The judges know no {kind} {missing[0]!r}; they know: {', '.join(known)}.")
        if (others := sum(item.role == "others" for item in self.items)) < LEAST_OTHERS:
            raise ValueError(f"There are {others} pictures of names that are kept; at least {LEAST_OTHERS} are needed.")
        if (self.attack is None) != (self.examples is None):
            raise ValueError("An attack needs examples of what it is to bring back, and examples need an attack.")

    def read(self, pictures: UInt8[Tensor, "n 3 h w"]) -> Readings:
        return Readings.of(self.judges, pictures, [item.prompt for item in self.items])

    def report(
        self,
        model: ImageModel,
        drawn: Callable[..., Tensor],
        recovered: Callable[..., Tensor],
        before: Readings | None,
    ) -> Report:
        """The scores of the model as it is; `drawn` and `recovered` draw its pictures, or remember them."""
        now = self.read(drawn(model, self.benchmark, self.items))
        columns = Columns(self.benchmark, self.judges, self.concepts, self.items, now, before).scores()
        return Report((*columns, *self._recovery(model, recovered)), self._settings())

    def _recovery(self, model: ImageModel, recovered: Callable[..., Tensor]) -> Iterator[Score]:
        """How many pictures after the attack show what it was made for: the erased names, and the unrelated one."""
        if self.examples is None:
            return
        erased = [concept.name for concept in self.concepts]
        unrelated = [name for name in (self.benchmark.unrelated,) if name and name not in erased]
        for part, names in (("all", erased), ("unrelated", unrelated)):
            goals = [Goal(name, self.examples(name)) for name in names]
            hits = [
                self._hits(goal.name, recovered(model, self.benchmark, self.attack, self.seed, goal)) for goal in goals
            ]
            if hits:
                yield score("recovery", type(self.attack).__name__, share(torch.cat(hits)), part)

    def _hits(self, name: str, pictures: UInt8[Tensor, "n 3 h w"]) -> Bool[Tensor, " n"]:
        return judged(self.judges, self.benchmark.kind, pictures) == index(self.judges, self.benchmark.kind, name)

    def _settings(self) -> dict[str, Any]:
        """How the report was made."""
        prompts = {name: getattr(self.benchmark, name) for name in ("kind", "seed", "steps", "guidance", "unrelated")}
        attack = {} if self.attack is None else {"attack": repr(self.attack), "attack_seed": self.seed}
        return {**prompts, "erased": [concept.name for concept in self.concepts], **attack}
