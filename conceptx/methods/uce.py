"""UCE, Unified Concept Editing (Gandikota, Orgad, Belinkov, Materzyńska, Bau 2024, arXiv 2308.14761)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.eraser import Eraser, all_names, as_concepts, check_roles, provenance
from conceptx.geometry import WeightedRows, capped, replacement, weighted_dual
from conceptx.geometry.arrays import to_working
from conceptx.models import DiffusionModel
from conceptx.models.token_rows import EMPTY, Phrase, TokenRows, Tokens

Form = Literal["replace", "orthogonal", "debias"]
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
              so the edit is that map and needs no weights. "orthogonal" (the authors' "tensor"): W c* without its
              part along W c.
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
    attributes: of the debias form, pairs (prompt p, a_p); `attribute_weights` makes the a_p of one round.

    Retained are the concepts' `retain` and, always, the empty prompt.

    Differs from the authors' code: one factorisation in float64 serves all layers, where they invert a float32 matrix
    for each; an empty anchor is the end-of-text row (their index falls on the row of the beginning token, which is
    never a subject here); an anchor defaults to the empty prompt for styles too (theirs: "art"), and their list of
    1,734 artists to retain is not shipped; debiasing returns one round's edit and changes nothing in place.
    """

    form: Form = "replace"
    tokens: Tokens = "last+rest"
    retain_tokens: RetainTokens = "all"
    erase_weight: float = 1.0  # α
    retain_weight: float | None = None  # β
    ridge: float = 0.5  # λ
    templates: tuple[str, ...] = ("{}",)
    synonyms: bool = False
    attributes: tuple[tuple[str, float], ...] = ()  # p, a_p

    def __post_init__(self) -> None:
        for name, choices in (("form", Form), ("tokens", Tokens), ("retain_tokens", RetainTokens)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}.")
        weights = {"erase_weight": self.erase_weight, "retain_weight": self.retain_weight, "ridge": self.ridge}
        if wrong := [name for name, weight in weights.items() if weight is not None and not 0 < weight < math.inf]:
            raise ValueError(f"{', '.join(wrong)} must be positive and finite.")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"Each of the templates must contain {{}} once for the name, got {self.templates}.")
        if (self.form == "debias") != bool(self.attributes):
            raise ValueError(f"The debias form, and no other, needs attributes; the form is {self.form!r}.")

    def erase(self, model: DiffusionModel, concept: Concept | Sequence[Concept], *, seed: int = 0) -> Edit:
        """The edit that erases all the concepts at once: a map of the token rows, or low-rank changes (see `form`).

        seed: recorded, not used; nothing is drawn.
        Raises ValueError when there is no concept or one twice, when what is to be erased is retained or is the anchor
        of another or itself, when the tokenizer would cut a prompt, or when an edit is in force on the model; the model
        stays as it is.
        """
        self._accept(model)
        concepts = as_concepts(concept)
        check_roles(concepts)
        task = self._task(model, concepts)
        record = provenance(self, concepts, seed, beta=float(task.retained.weights[0]))
        if self.form == "replace":
            maps = {"text": (replacement(task.keys, torch.cat(task.anchors), task.retained, self.ridge),)}
            return Edit(model.text_fingerprint, maps=maps, provenance=(record,))
        return Edit(model.fingerprint, deltas=self._deltas(model, task), provenance=(record,))

    def _task(self, model: DiffusionModel, concepts: Sequence[Concept]) -> _Task:
        """All rows, from one call of the text encoder."""
        pairs = [pair for concept in concepts for pair in self._pairs(concept)]
        kept = [EMPTY, *((name, name) for name in all_names(concepts, "retain"))]
        attributes = [(prompt, prompt) for prompt, _ in self.attributes]
        phrases = [*(phrase for pair in pairs for phrase in pair), *kept, *attributes]
        encoded = TokenRows.of(model, phrases, trimmed=self.tokens == self.retain_tokens == "last")
        blocks = [encoded.aligned([*pair, *attributes], self.tokens) for pair in pairs]
        beta = max(0.1, 1 / len(kept)) if self.retain_weight is None else self.retain_weight
        return _Task(
            keys=WeightedRows.of(torch.cat([block[0] for block in blocks]), self.erase_weight),
            anchors=[block[1] for block in blocks],
            attributes=[block[2:] for block in blocks],
            retained=WeightedRows.of(self._retained(encoded, kept), beta),
        )

    def _retained(self, encoded: TokenRows, kept: Sequence[Phrase]) -> Tensor:
        """All rows of the retained prompts, the beginning token's too, or each name's last."""
        return encoded.last_rows(kept) if self.retain_tokens == "last" else torch.cat([*map(encoded.block, kept)])

    def _pairs(self, concept: Concept) -> Iterable[tuple[Phrase, Phrase]]:
        """(erased, anchor) in every prompt form."""
        for name in (concept.name, *(concept.synonyms if self.synonyms else ())):
            for template in self.templates:
                anchor = (concept.anchor or "").strip()
                yield (template.format(name), name), (template.format(anchor), anchor) if anchor else EMPTY

    def _deltas(self, model: DiffusionModel, task: _Task) -> dict[str, LowRank]:
        """(V - W C) L for the targets V of each projection W; L is the same for all."""
        read = weighted_dual(task.keys, task.retained, self.ridge)
        deltas = {}
        for projection in model.projections:
            weight = model.parameter(f"{projection}.weight")
            assert weight is not None  # only biases may be absent
            deltas[f"{projection}.weight"] = LowRank(*capped(self._changes(to_working(weight), task).T, read))
        return deltas

    def _changes(self, weight: Tensor, task: _Task) -> Tensor:
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


@dataclass(frozen=True, eq=False)
class _Task:
    """Token rows of everything, in float64. keys: of all erased prompts; the lists have an entry for each prompt."""

    keys: WeightedRows
    anchors: list[Tensor]  # (rows, d) each
    attributes: list[list[Tensor]]
    retained: WeightedRows
