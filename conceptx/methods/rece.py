"""RECE, Reliable and Efficient Concept Erasure (Gong, Chen, Wei, Chen, Jiang 2024, arXiv 2407.12383)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, as_concepts, check_roles, provenance
from conceptx.geometry import ConceptMap, DenseMetric, WeightedRows, replacement
from conceptx.geometry.arrays import gram, to_working
from conceptx.methods.uce import UCE
from conceptx.models import DiffusionModel
from conceptx.models.token_rows import TokenRows
from conceptx.progress import track
from conceptx.settings import require_choices, require_positive, tunable

Regulariser = Literal["zero", "standard", "surrogate_outputs", "surrogate_rows", "surrogate_both"]
Reference = Literal["current", "original"]
RoundTokens = Literal["block", "last", "last+rest", "all"]


@dataclass(frozen=True)
class RECE(Eraser):
    """UCE, then rounds that find the rows which still give the concept and erase those too (arXiv 2407.12383).

    W are the original keys and values, W' the edited ones. The row c' by which W' comes closest to what W made of c,

        c' = argmin_x sum |W' x - W c|^2 + inversion_ridge |x|^2,

    is erased towards the row c0 that stands at its place in the anchor's prompt:

        W'' = argmin sum |W'' c' - W' c0|^2 + retain_weight sum |W'' r - W' r|^2 + ridge |W'' - W'|^2

    (Eq. 3 of the paper; the body of the paper was not at hand, the other equations are read from the authors' code.)
    All W' = W T share the map T of the text, so with S = sum W'W only c' = (rho I + T'ST)^-1 T'S c and T change from
    round to round. The rows of a round are all found first, then erased together.

    rounds:          how many. Published: 3 for nudity, 2 for 11 unsafe words, 1 for artists and objects.
    inversion_ridge: rho. Published: 0.1; 1e-3 for artists and for objects that are hard to erase.
    regulariser:     what rho weighs. "zero" (published): |x|^2. The code's others: "standard": |x - c0|^2,
                     "surrogate_outputs": sum |W' x - W' c|^2, "surrogate_rows": |x - c|^2, "surrogate_both": their sum.
    retain_weight:   l1.
    ridge:           l2.
    tokens:          which rows of the concept's prompt are c: "block" (the code): all, those of the beginning token and
                     of the padding too, each towards the same place of the anchor's prompt. Otherwise as in `UCE`.
    reference:       what a round holds on to. "current" (default; the code, behind the published numbers): the weights
                     W' it starts from, so that nothing bounds how far many rounds drift. "original": W; every round
                     then solves once from W for all rows found so far and those of the start, and its cost at W
                     bounds what it does: retain_weight sum |W'' r - W r|^2 <= sum |W (c0 - c')|^2 over those rows.
    start:           UCE, in its "replace" form, before the first round: prompt forms, synonyms, constants and which
                     rows are retained, also in the rounds.

    The edit records after the start and after each round how well W' still gives the concept, `regeneration_error` =
    |W' c' - W c| / |W c|, and `retained_drift` = |W' r - W r| / |W r|, over all rows: where the first no longer rises,
    more rounds only drift.

    Differs from the authors' code: two d x d matrices in float64 instead of a loop over the layers; they choose a round
    by what a detector finds in generated images, here all rounds are made and the caller compares; what the rounds
    retain is what UCE retains, where they give a blank prompt for every concept.
    """

    rounds: int = tunable(3, 1, 10)
    inversion_ridge: float = tunable(0.1, 0.001, 10.0, log=True)  # ρ
    regulariser: Regulariser = "zero"
    retain_weight: float = tunable(0.1, 0.001, 10.0, log=True)  # l1
    ridge: float = tunable(0.1, 0.001, 10.0, log=True)  # l2
    tokens: RoundTokens = "block"
    reference: Reference = "current"
    start: UCE = field(default_factory=UCE)

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "inversion_ridge", "retain_weight", "ridge")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}.")
        if self.start.form != "replace":
            raise ValueError(f"RECE starts from UCE's replace form, which is a map; got {self.start.form!r}.")

    def erase(self, model: DiffusionModel, concept: Concept | Sequence[Concept], *, seed: int = 0) -> Edit:
        """The edit that erases all the concepts at once: one map of the token rows.

        seed: recorded, not used; nothing is drawn.
        Raises ValueError where `UCE.erase` does; the model stays as it is.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        task = self.start.task(model, concepts)
        weights = (model.parameter(f"{projection}.weight") for projection in model.projections)
        outputs = output_gram(weight for weight in weights if weight is not None)
        search = Search(outputs, *self._rows(model, concepts), condensed(task.retained.rows))
        beta = float(task.retained.weights[0])
        found, standing = self.solve(search, task.keys, torch.cat(task.anchors), beta)
        record = provenance(self, concepts, seed, beta=beta, standing=standing)
        return Edit(model.text_fingerprint, maps={"text": (found,)}, provenance=(record,))

    def _rows(self, model: DiffusionModel, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """c and c0 (n, d), row by row."""
        pairs = [pair for concept in concepts for pair in self.start.pairs(concept)]
        encoded = TokenRows.of(model, [phrase for pair in pairs for phrase in pair])
        if self.tokens == "block":
            blocks = [[encoded.block(phrase) for phrase in pair] for pair in pairs]
        else:
            blocks = [encoded.aligned(pair, self.tokens) for pair in pairs]
        return torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])

    def solve(
        self, search: Search, keys: WeightedRows, targets: Float[Tensor, "k d"], beta: float
    ) -> tuple[ConceptMap, list[dict[str, float]]]:
        """The map after all rounds, and how it stood after the start and after each round.

        keys, targets, beta: what the start erases, towards what, and how much a retained row counts there.
        """
        retained = WeightedRows.of(search.kept, self.retain_weight)
        current = replacement(keys, targets, WeightedRows.of(search.kept, beta), self.start.ridge)
        found = search.invert(current, self.inversion_ridge, self.regulariser)
        standing = [search.standing(current, found)]
        for _ in track(range(self.rounds), "RECE rounds"):
            fresh = WeightedRows.of(found)
            if self.reference == "current":
                current = replacement(fresh, search.harmless, retained, self.ridge).then(current)
            else:
                keys = WeightedRows(torch.cat([keys.rows, found]), torch.cat([keys.weights, fresh.weights]))
                targets = torch.cat([targets, search.harmless])
                current = replacement(keys, targets, retained, self.ridge)
            found = search.invert(current, self.inversion_ridge, self.regulariser)
            standing.append(search.standing(current, found))
        return current, standing


@dataclass(frozen=True, eq=False)
class Search:
    """Rows that still give a concept when all layers read the text through a map T.

    outputs: S = sum W'W of the layers: |sum of their outputs|^2 for x is x'S x.
    rows:    c, and `harmless`: c0 in their places.  kept: the retained rows, or as many with the same second moments.
    """

    outputs: Float[Tensor, "d d"]
    rows: Float[Tensor, "n d"]
    harmless: Float[Tensor, "n d"]
    kept: Float[Tensor, "m d"]

    def invert(self, current: ConceptMap, ridge: float, regulariser: Regulariser = "zero") -> Float[Tensor, "n d"]:
        """The rows c' = argmin_x |x|: sum |W T x - W c|^2 + the ridge's part, one for each c."""
        across = self.outputs + (self.outputs @ current.write) @ current.read  # S T
        metric = across + current.read.T @ (current.write.T @ across)  # T'S T
        outputs, size, towards = {
            "zero": (0.0, 1.0, torch.zeros_like(self.rows)),
            "standard": (0.0, 1.0, self.harmless),
            "surrogate_outputs": (1.0, 0.0, self.rows),
            "surrogate_rows": (0.0, 1.0, self.rows),
            "surrogate_both": (1.0, 1.0, self.rows),
        }[regulariser]
        left = (1 + ridge * outputs) * metric + ridge * size * torch.eye(len(metric)).to(metric)
        right = self.rows @ (across + ridge * outputs * metric) + ridge * size * towards
        return DenseMetric(left).solve(right.T).T

    def standing(self, current: ConceptMap, adversarial: Float[Tensor, "n d"]) -> dict[str, float]:
        """How far the best rows are from giving the concept, and how far what is retained has moved."""
        return {
            "regeneration_error": self._size(current(adversarial) - self.rows) / self._size(self.rows),
            "retained_drift": self._size(current(self.kept) - self.kept) / self._size(self.kept),
        }

    def _size(self, rows: Tensor) -> float:
        """The root of sum |W x|^2 over layers and rows."""
        return math.sqrt(max(float(((rows @ self.outputs) * rows).sum()), 0.0))


def output_gram(weights: Iterable[Float[Tensor, "out d"]]) -> Float[Tensor, "d d"]:
    """S = sum W'W over the layers that read the text."""
    return reduce(add, (gram(to_working(weight)) for weight in weights))


def condensed(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """The rows, or d of them with the same second moments, which is all that a solve sees of what is retained."""
    return rows if len(rows) <= rows.shape[1] else WeightedRows.of_gram(gram(rows)).rows
