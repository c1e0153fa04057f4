"""UCE, Unified Concept Editing (Gandikota, Orgad, Belinkov, Materzyńska, Bau 2024, arXiv 2308.14761)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance
from conceptx.geometry import WeightedRows, capped, replacement, weighted_dual
from conceptx.geometry.arrays import to_working
from conceptx.models import DiffusionModel, ImageModel
from conceptx.models.token_rows import EMPTY, Phrase, TokenRows, Tokens
from conceptx.progress import report
from conceptx.settings import require_choices, require_positive, require_templates, tunable

if TYPE_CHECKING:
    from conceptx.methods.ledger import Ledger

Form = Literal["replace", "moderate", "orthogonal", "debias"]
MAPS = ("replace", "moderate")  # forms that are one map of the text side, whatever reads it
Judge = Callable[[Tensor], Iterable[int]]  # images (n, 3, h, w) in [0, 1] -> the number of the attribute on each
RetainTokens = Literal["last", "all"]

# The authors' extra prompt forms, off by default there and here (spec, section 5).
STYLE_TEMPLATES = ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OBJECT_TEMPLATES = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
DEBIAS_TEMPLATES = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}")


@dataclass(frozen=True)
class UCE(Eraser):
    """Re-solve the cross-attention keys and values so that concepts read as others, in closed form (arXiv 2308.14761).

    The paper's Eq. 7, with the ridge of the authors' code: W' minimises

        erase_weight sum |W' c - v|^2 + retain_weight sum |W' r - W r|^2 + ridge |W' - W|^2

    over the token rows c of the concepts and r of the retained prompts. Any number of concepts is solved at once.

    form:     what v is. "replace": W c*, with c* of the anchor; all projections then share one map of the text side,
              so the edit is that map and needs no weights. "moderate": the same with the empty prompt, whatever the
              anchor. "orthogonal" (the authors' "tensor"): W c* without its part along W c.
              "debias": W c + sum_p a_p |W c| W c_p / |W c_p|. Norms and products are over a prompt's whole block
              of rows; these two give a low-rank change of each projection.
    tokens:   which rows of a prompt are c. "last": the subject's last token, as the newest code. "last+rest": that
              and all after it, as the code behind the paper's numbers. "all": from the first token on.
    retain_tokens: "all" rows of a retained prompt (the paper's code), or "last" (the newest code).
    erase_weight:  alpha.
    retain_weight: beta; None: max(0.1, 1 / number of retained prompts), the paper's code.
    ridge:         lambda.
    templates: prompt forms of each concept; a named anchor takes the same form. See STYLE_TEMPLATES and its fellows.
    synonyms:  erase the concepts' synonyms too (published: only the names given).
    attributes: of the debias form, pairs (prompt p, a_p); `debias` finds the a_p.

    Retained are the concepts' `retain` and, always, the empty prompt. On a model that draws token by token the rows are
    those that its decoder reads of a prompt (no paper does this): each is a function of its token alone, so that a name
    of several tokens is erased by its last.

    Differs from the authors' code: one factorisation in float64 serves all layers, where they invert a float32 matrix
    for each; an empty anchor is the end-of-text row (their index falls on the row of the beginning token, which is
    never a subject here); an anchor defaults to the empty prompt for styles too (theirs: "art"), and their list of
    1,734 artists to retain is not shipped; debiasing changes nothing in place (see `debias`).
    """

    form: Form = "replace"
    tokens: Tokens = "last+rest"
    retain_tokens: RetainTokens = "all"
    erase_weight: float = tunable(1.0, 0.01, 100.0, log=True)  # α
    retain_weight: float | None = None  # β
    ridge: float = tunable(0.5, 0.01, 100.0, log=True)  # λ
    templates: tuple[str, ...] = ("{}",)
    synonyms: bool = False
    attributes: tuple[tuple[str, float], ...] = ()  # p, a_p

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "erase_weight", "retain_weight", "ridge")
        require_templates(self.templates)
        if (self.form == "debias") != bool(self.attributes):
            raise ValueError(f"The debias form, and no other, needs attributes; the form is {self.form!r}.")

    def erase(self, model: ImageModel, concept: Concept | Sequence[Concept], *, seed: int = 0) -> Edit:
        """The edit that erases all the concepts at once: a map of the token rows, or low-rank changes (see `form`).

        seed: recorded, not used; nothing is drawn.
        Raises ValueError when there is no concept or one twice, when what is to be erased is retained or is the anchor
        of another or itself, when the tokenizer would cut a prompt, when no projection reads the text and the form
        changes projections, or when an edit is in force on the model; the model stays as it is.
        """
        self._accept(model)
        if self.form not in MAPS and not model.projections:
            raise ValueError(f"The {self.form} form changes projections that read the text; this model has none.")
        concepts = as_concepts(concept)
        check_roles(concepts)
        task = self.task(model, concepts)
        record = provenance(self, concepts, seed, beta=float(task.retained.weights[0]))
        if self.form in MAPS:
            maps = {"text": (replacement(task.keys, torch.cat(task.anchors), task.retained, self.ridge),)}
            return Edit(model.text_fingerprint, maps=maps, provenance=(record,))
        return Edit(model.fingerprint, deltas=self._deltas(model, task), provenance=(record,))

    def open(self, model: DiffusionModel, concept: Concept | Sequence[Concept]) -> Ledger:
        """What `erase` solves, kept open: concepts are added and removed by updates, without solving anew.

        Raises ValueError where `erase` does, and for the forms whose targets differ by layer.
        """
        from conceptx.methods.ledger import Ledger

        return Ledger.of(self, model, as_concepts(concept))

    def task(self, model: ImageModel, concepts: Sequence[Concept]) -> Task:
        """All rows, from one call of the text encoder."""
        pairs = [pair for concept in concepts for pair in self.pairs(concept)]
        kept = [EMPTY, *((name, name) for name in all_names(concepts, "retain"))]
        attributes = [(prompt, prompt) for prompt, _ in self.attributes]
        blocks, retained = self.rows(model, pairs, kept, attributes)
        return Task(
            keys=WeightedRows.of(torch.cat([block[0] for block in blocks]), self.erase_weight),
            anchors=[block[1] for block in blocks],
            attributes=[block[2:] for block in blocks],
            retained=WeightedRows.of(torch.cat(retained), self.beta(len(kept))),
        )

    def rows(
        self,
        model: ImageModel,
        pairs: Sequence[tuple[Phrase, Phrase]],
        kept: Sequence[Phrase],
        attributes: Sequence[Phrase] = (),
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """(of each pair its rows, the anchor's and the attributes', cut to one length; of each retained prompt all
        rows, the beginning token's too, or the name's last), from one call of the text encoder."""
        phrases = [*(phrase for pair in pairs for phrase in pair), *kept, *attributes]
        encoded = TokenRows.of(model, phrases, trimmed=self.tokens == self.retain_tokens == "last")
        blocks = [encoded.aligned([*pair, *attributes], self.tokens) for pair in pairs]
        if self.retain_tokens == "last":
            return blocks, list(encoded.last_rows(kept).split(1)) if kept else []
        return blocks, [encoded.block(phrase) for phrase in kept]

    def beta(self, kept: int) -> float:
        """The weight of each retained row when so many prompts are retained."""
        return max(0.1, 1 / kept) if self.retain_weight is None else self.retain_weight

    def pairs(self, concept: Concept) -> Iterable[tuple[Phrase, Phrase]]:
        """(erased, anchor) in every prompt form."""
        for name in (concept.name, *(concept.synonyms if self.synonyms else ())):
            for template in self.templates:
                anchor = "" if self.form == "moderate" else (concept.anchor or "").strip()
                yield (template.format(name), name), (template.format(anchor), anchor) if anchor else EMPTY

    def _deltas(self, model: ImageModel, task: Task) -> dict[str, LowRank]:
        """(V - W C) L for the targets V of each projection W; L is the same for all."""
        read = weighted_dual(task.keys, task.retained, self.ridge)
        deltas = {}
        for projection in model.projections:
            weight = model.parameter(f"{projection}.weight")
            assert weight is not None  # only biases may be absent
            deltas[f"{projection}.weight"] = LowRank(*capped(self._changes(to_working(weight), task).T, read))
        return deltas

    def _changes(self, weight: Tensor, task: Task) -> Tensor:
        """V - W C as rows (k, out), prompt by prompt."""
        blocks = (task.keys.rows @ weight.T).split([len(anchor) for anchor in task.anchors])
        if self.form == "orthogonal":
            anchors = [anchor @ weight.T for anchor in task.anchors]
            targets = [without(anchor, block) for block, anchor in zip(blocks, anchors, strict=True)]
        else:
            shifts = [weight_p for _, weight_p in self.attributes]
            directions = [[rows @ weight.T for rows in block] for block in task.attributes]
            targets = [debiased(block, rows, shifts) for block, rows in zip(blocks, directions, strict=True)]
        return torch.cat(targets) - torch.cat(blocks)


def without(anchor: Tensor, block: Tensor) -> Tensor:
    """The orthogonal form's target: anchor - <u, anchor> u with u = block / |block|, all over the whole (rows, out)."""
    unit = block / torch.linalg.vector_norm(block)
    return anchor - (unit * anchor).sum() * unit


def debiased(block: Tensor, attributes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The debias form's target: block + sum_p a_p |block| block_p / |block_p|, norms over the whole (rows, out)."""
    size = torch.linalg.vector_norm(block)
    units = [attribute / torch.linalg.vector_norm(attribute) for attribute in attributes]
    return block + size * sum(weight * unit for weight, unit in zip(weights, units, strict=True))


def attribute_weights(
    observed: Mapping[str, float],
    wanted: Mapping[str, float],
    step: float = 0.1,
    before: Mapping[str, float] | None = None,
) -> tuple[tuple[str, float], ...]:
    """The `attributes` of a debiasing round: a_p = before_p + step (wanted_p - observed_p), shares of images in [0, 1].

    before: the a_p of the round that `observed` was measured after. Each round then solves from the original weights.
    Raises ValueError when the shares observed and wanted are not of the same attributes.
    """
    if observed.keys() != wanted.keys():
        raise ValueError(f"Shares were observed of {sorted(observed)} and are wanted of {sorted(wanted)}.")
    start = before or {}
    return tuple((p, start.get(p, 0.0) + step * (wanted[p] - observed[p])) for p in wanted)


DEBIASING = UCE(retain_weight=0.1, templates=DEBIAS_TEMPLATES)  # the solve of the authors' first loop


@dataclass(frozen=True)
class Round:
    """The a_p that were in force, the shares of images that showed each attribute, and how far they are from wanted."""

    weights: Mapping[str, float]
    shares: Mapping[str, float]
    gap: float  # the largest |observed - wanted|


@dataclass(frozen=True, eq=False)
class Debiasing:
    """All rounds (the first draws with the original model), the number of the one with the smallest gap, its edit."""

    edit: Edit
    rounds: tuple[Round, ...]
    best: int


def debias(
    model: DiffusionModel,
    concept: Concept,
    attributes: Sequence[str],
    *,
    judge: Judge,
    wanted: Mapping[str, float] | None = None,
    rounds: int = 30,
    images: int = 50,
    tolerance: float = 0.05,
    step: float = 0.1,
    seed: int = 0,
    eraser: UCE = DEBIASING,
    **options: Any,
) -> Debiasing:
    """Draw the concept, see how often each attribute shows, move its keys and values that way, draw again.

    attributes: a prompt of each ("a male person"); the judge says which of them an image shows, by its number.
    wanted:     the share of each attribute; None: equal shares.
    rounds:     at most; it ends sooner when the largest |observed - wanted| is below the tolerance.
    images:     in a round, shared out among the concept's `prompts` (or its name), each round with seeds of its own.
    step:       a_p grows by step (wanted_p - observed_p) in each round; every solve starts from the original weights.
    eraser:     the settings of the solve; its form and attributes are the loop's.
    options:    for `model.generate`, such as steps and guidance.

    Differs from the authors' code: their first one multiplies the edits of all rounds into the weights and draws 5
    times 10 images (the 50 here); their newest adds wanted - observed without a step and in a tensor that it changes
    twice. Here a round's edit depends on the a_p alone. They take many concepts and move those that are done to the
    retained; here it is one concept: retain the others, and add the edits.

    Raises ValueError when fewer than two attributes are given or one twice, when the shares wanted are not theirs or do
    not add up to 1, when rounds, images, tolerance or step is not positive, when the judge answers with something else
    than a number of an attribute for each image, and whatever the eraser refuses; the model stays as it is.
    """
    goal = dict.fromkeys(attributes, 1 / max(len(attributes), 1)) if wanted is None else dict(wanted)
    _check_loop(attributes, goal, {"rounds": rounds, "images": images, "tolerance": tolerance, "step": step})
    asked = list(islice(cycle(concept.prompts or (concept.name,)), images))
    settings = replace(eraser, form="debias", attributes=tuple((p, 0.0) for p in attributes))
    edit = kept = settings.erase(model, concept, seed=seed)
    history, best = list[Round](), 0
    for number in range(rounds):
        draw = random.Random(f"{seed} {number}")
        with edit.applied(model):
            drawn = model.generate(asked, seeds=[draw.getrandbits(31) for _ in asked], **options)
        shares = _shares(judge(drawn), attributes, images)
        history.append(Round(dict(settings.attributes), shares, max(abs(shares[p] - goal[p]) for p in attributes)))
        if history[number].gap < history[best].gap:
            kept, best = edit, number
        report("debiasing", number + 1, rounds, f"largest gap {history[number].gap:.2f}")
        if history[number].gap < tolerance or number + 1 == rounds:
            break
        settings = replace(settings, attributes=attribute_weights(shares, goal, step, dict(settings.attributes)))
        edit = settings.erase(model, concept, seed=seed)
    return Debiasing(kept, tuple(history), best)


def _check_loop(attributes: Sequence[str], wanted: Mapping[str, float], positive: Mapping[str, float]) -> None:
    if isinstance(attributes, str) or len(set(attributes)) < 2 or len(set(attributes)) != len(attributes):
        raise ValueError(f"Debiasing takes a list of two attributes or more, each once, got {attributes!r}.")
    if wanted.keys() != {*attributes} or min(wanted.values()) < 0 or abs(sum(wanted.values()) - 1) > 1e-6:
        raise ValueError(f"wanted must hold a share of each of {list(attributes)} that add up to 1, got {wanted}.")
    if wrong := [name for name, value in positive.items() if not 0 < value < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be positive and finite.")


def _shares(answers: Iterable[int], attributes: Sequence[str], images: int) -> dict[str, float]:
    """How often the judge named each attribute."""
    found = [int(answer) for answer in answers]
    if len(found) != images or not all(0 <= answer < len(attributes) for answer in found):
        given = f"{len(found)} answers of {sorted(set(found))[:5]}"
        raise ValueError(f"The judge must answer 0..{len(attributes) - 1} for each of {images} images, got {given}.")
    return {p: found.count(number) / images for number, p in enumerate(attributes)}


@dataclass(frozen=True, eq=False)
class Task:
    """Token rows of everything, in float64. keys: of all erased prompts; the lists have an entry for each prompt."""

    keys: WeightedRows
    anchors: list[Tensor]  # (rows, d) each
    attributes: list[list[Tensor]]
    retained: WeightedRows
