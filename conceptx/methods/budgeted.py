"""Budgeted erasure, this library's own: the task of UCE (Gandikota et al. 2024, arXiv 2308.14761) with hard limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance
from conceptx.geometry import ConceptMap
from conceptx.geometry.budget import Budget, Certificate
from conceptx.models import DiffusionModel
from conceptx.models.token_rows import EMPTY, Phrase, TokenRows
from conceptx.settings import require_choices, tunable

Rows = Literal["last", "last+end", "last+rest"]


class BudgetTooTight(ValueError):
    """No edit keeps to the budget.

    concept, anchor: what cannot come close enough, and to what; of several concepts the one that counts most.
    bound:           in every edit that keeps to the other limits, one of the concepts at least is left with this share
                     of its distance to its anchor.
    multipliers:     how much closer they could come for each unit of drift that a retained name were given more.
    retained:        the name with the largest, which forbids it; None where the size of the edit does.
    certificate:     the proof.
    """

    def __init__(
        self, concept: str, anchor: str, multipliers: Mapping[str, float], certificate: Certificate, several: bool
    ) -> None:
        self.concept, self.anchor, self.bound = concept, anchor, certificate.bound
        self.multipliers, self.certificate = dict(multipliers), certificate
        worst = max(multipliers, key=multipliers.__getitem__)
        self.retained = worst if multipliers[worst] > 1e-6 else None
        limits = [f"the edit is no larger than {certificate.budget.largest:g}"]
        if self.retained is not None:
            limits.insert(0, f"{_spoken(self.retained)} may drift at most {certificate.budget.drift:g}")
        super().__init__(
            f"{concept}{' or another of the concepts' if several else ''} keeps at least {self.bound:.3g} of its "
            f"distance to {_spoken(anchor)} while {' and '.join(limits)}; at most {certificate.budget.distance:g} "
            "was asked for."
        )


@dataclass(frozen=True)
class Budgeted(Eraser):
    """The smallest edit that moves concepts as far as asked and retained names no further than allowed, or a proof.

    No paper's: it is this library's own. UCE (arXiv 2308.14761, Eq. 7) weighs what is erased against what is retained
    in one sum and cannot say beforehand how far either moves. Here both are limits, and what is minimised is the edit:

        minimise |M|  with  |T c - c*| <= target_distance |c* - c|  for every erased row c with the anchor's row c*,
                            |M r| <= retain_drift |r|               for every retained row r,

    T = I + M, the Frobenius norm for |M|: a second-order cone program, solved in the span of the rows
    (`conceptx.geometry.budget`). Rows that no limit names move by at most |M| times their length. The edit is a map of
    the token rows and holds for every denoiser that reads these text encoders.

    retain_drift:    how far a retained row may move, as a share of its length.
    target_distance: how much of its way to the anchor a row may be left with.
    largest:         no edit with a larger |M| is looked for; to move one row alone takes |c* - c| / |c|. Rows that are
                     nearly the same can be held apart by a very large edit only, which spoils every row not named.
    tokens:          which rows are c and r. "last": the name's last token. "last+end": that and the end-of-text token,
                     which in CLIP carries the object too, and which the padding resembles. "last+rest": that and all
                     behind it; takes minutes with more than ten retained names.
    synonyms:        erase the concepts' synonyms too.

    Retained are the concepts' `retain` and, always, the empty prompt; a concept without an anchor becomes that prompt.
    Needs cvxpy.
    """

    retain_drift: float = tunable(0.1, 0.01, 1.0, log=True)
    target_distance: float = tunable(0.1, 0.01, 0.9, log=True)
    largest: float = 20.0
    tokens: Rows = "last+end"
    synonyms: bool = False

    def __post_init__(self) -> None:
        require_choices(self)
        if not (0 <= self.retain_drift < math.inf and 0 <= self.target_distance < 1):
            raise ValueError("retain_drift must be finite and at least 0, target_distance at least 0 and less than 1.")
        if not 0 < self.largest < math.inf:
            raise ValueError(f"largest must be positive and finite, got {self.largest}.")

    def erase(self, model: DiffusionModel, concept: Concept | Sequence[Concept], *, seed: int = 0) -> Edit:
        """The smallest edit within the budget, a map of the token rows.

        seed: recorded, not used; nothing is drawn.
        Raises BudgetTooTight when there is none; ValueError when there is no concept or one twice, when what is to be
        erased is retained or is an anchor or reads just as its anchor, when the tokenizer would cut a prompt, or when
        an edit is in force on the model; ImportError without cvxpy. The model stays as it is.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        task = self._task(model, concepts)
        found = task.budget.smallest()
        if isinstance(found, Certificate):
            raise task.refusal(found)
        record = provenance(self, concepts, seed, size=_size(found))
        return Edit(model.text_fingerprint, maps={"text": (found,)}, provenance=(record,))

    def _task(self, model: DiffusionModel, concepts: Sequence[Concept]) -> _Task:
        pairs = [pair for concept in concepts for pair in self._pairs(concept)]
        kept = [EMPTY, *((name, name) for name in all_names(concepts, "retain"))]
        phrases = [*(phrase for pair in pairs for phrase in pair), *kept]
        encoded = TokenRows.of(model, phrases, trimmed=self.tokens != "last+rest")
        blocks = [self._aligned(encoded, pair) for pair in pairs]
        for (erased, anchor), (old, new) in zip(pairs, blocks, strict=True):
            if bool((old == new).all(1).any()):
                raise ValueError(
                    f"A row of {erased[1]} is just the row of {_spoken(anchor[1])}; nothing could move it."
                )
        retained = [self._rows(encoded, phrase) for phrase in kept]
        keys, targets = (torch.cat([block[side] for block in blocks]) for side in (0, 1))
        limits = (self.retain_drift, self.target_distance, self.largest)
        return _Task(
            Budget(keys, targets, torch.cat(retained), *limits),
            [pair for pair, block in zip(pairs, blocks, strict=True) for _ in block[0]],
            [phrase for phrase, rows in zip(kept, retained, strict=True) for _ in rows],
        )

    def _pairs(self, concept: Concept) -> Iterator[tuple[Phrase, Phrase]]:
        """(erased, anchor) of each name."""
        anchor = (concept.anchor or "").strip()
        for name in (concept.name, *(concept.synonyms if self.synonyms else ())):
            yield (name, name), (anchor, anchor)

    def _aligned(self, encoded: TokenRows, pair: tuple[Phrase, Phrase]) -> list[Tensor]:
        """The rows of a name and as many of its anchor; the empty prompt has only the end-of-text row for both."""
        rows = [self._rows(encoded, phrase) for phrase in pair]
        if self.tokens == "last+rest":
            return [block[: min(map(len, rows))] for block in rows]
        return [rows[0], rows[1].expand_as(rows[0])]

    def _rows(self, encoded: TokenRows, phrase: Phrase) -> Tensor:
        if self.tokens == "last+rest":
            return encoded.rows(phrase, "last+rest")
        end = int(encoded.prompts.end[encoded.place[phrase[0]]])
        places = [encoded.last(phrase), *([end] if self.tokens == "last+end" else [])]
        return encoded.block(phrase)[list(dict.fromkeys(places))]


@dataclass(frozen=True, eq=False)
class _Task:
    """A budget, and whose rows are in it: of each key (name, anchor), of each retained row the name."""

    budget: Budget
    pairs: list[tuple[Phrase, Phrase]]
    kept: list[Phrase]

    def refusal(self, proof: Certificate) -> BudgetTooTight:
        """In names: the concept with the largest share in the bound, and all that is retained."""
        (_, concept), (_, anchor) = self.pairs[int(proof.kept_away.argmax())]
        multipliers: dict[str, float] = {}
        for (_, name), multiplier in zip(self.kept, proof.forbidding.tolist(), strict=True):
            multipliers[name] = multipliers.get(name, 0.0) + multiplier
        several = len({name for (_, name), _ in self.pairs}) > 1
        return BudgetTooTight(concept, anchor, multipliers, proof, several)


def _size(edit: ConceptMap) -> float:
    """|M|; the columns written are orthonormal."""
    return float(torch.linalg.matrix_norm(edit.read))


def _spoken(name: str) -> str:
    return name or "the empty prompt"
