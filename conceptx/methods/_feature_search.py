"""Which features of a dictionary carry a concept: what is recorded, which features stand out, what each one does.

Everything is found from the concept's own texts and retained texts; no question of a benchmark is seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from conceptx.geometry import Dictionary
from conceptx.methods._concept_tokens import ConceptTokens
from conceptx.models import LanguageModel, batches
from conceptx.progress import track

if TYPE_CHECKING:
    from rich.table import Table

Place = Literal["at", "before"]
PLACES: tuple[Place, ...] = ("at", "before")  # at the tokens that name the concept, and one token before
CHUNK = 16  # texts scored at once
LONGEST = 32  # tokens of a retained text that are scored
RANKS = CHOSEN, LITTLE, VETOED, HARMS, NOTHING = (
    "chosen",
    "adds little",
    "vetoed",
    "harms the retained texts",
    "nothing forgotten",
)


@dataclass(frozen=True)
class Feature:
    """A feature of one layer's dictionary.

    promotes: whether it stands for the concept (the paper's `neg`: it is driven down), or against it.
    place:    where it is read; the signs of the neurons are taken there.
    """

    layer: int
    index: int
    promotes: bool = True
    place: Place = "at"

    @property
    def name(self) -> str:
        """LAYER/INDEX, with a minus sign for one that stands against the concept and "<" for one read before it."""
        return f"{self.layer}/{self.index}{'' if self.promotes else '-'}{'<' if self.place == 'before' else ''}"

    @staticmethod
    def parse(name: str) -> Feature:
        """The feature of that name. Raises ValueError when it is none."""
        rest, before = name.removesuffix("<"), name.endswith("<")
        layer, slash, index = rest.removesuffix("-").partition("/")
        if not (slash and layer.isdecimal() and index.isdecimal()):
            raise ValueError(f"A feature is named LAYER/INDEX, such as 6/0, 6/17- or 22/1<; got {name!r}.")
        return Feature(int(layer), int(index), not rest.endswith("-"), "before" if before else "at")


@dataclass(frozen=True)
class Candidate:
    """A feature and what is known of it.

    contrast:  difference of its mean activation on the concept and on the retained texts, in standard deviations.
    tokens:    the vocabulary tokens that its direction raises most (lowers most, where it stands against the concept).
    rows:      how many value vectors the edit of it alone changes.
    forgotten: what that edit takes from log p of the right one among the concept's tokens, where the model knew it; NaN
               where it was not measured, because the harm is above the limit.
    harm:      what it adds to the loss of a token of the retained texts, in nats.
    verdict:   why it was chosen or not.
    """

    feature: Feature
    contrast: float
    tokens: tuple[str, ...] = ()
    rows: int = 0
    forgotten: float = 0.0
    harm: float = 0.0
    verdict: str = ""


@dataclass(frozen=True)
class FeatureSearch:
    """All candidates, the chosen ones first; `forgotten` and `harm` are what the chosen ones do together."""

    candidates: tuple[Candidate, ...]
    forgotten: float
    harm: float

    @property
    def chosen(self) -> tuple[Feature, ...]:
        return tuple(c.feature for c in self.candidates if c.verdict == CHOSEN)

    def table(self, most: int = 12) -> Table:
        """For the terminal: what was chosen and why, and the best of the others."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title="Features", title_justify="left", box=SIMPLE_HEAD, caption_justify="left")
        for column in ("feature", "read", "contrast", "rows", "forgotten", "harm", "verdict", "raises"):
            table.add_column(column, justify="right" if column in ("contrast", "rows", "forgotten", "harm") else "left")
        for c in self.candidates[:most]:
            forgotten = "–" if math.isnan(c.forgotten) else f"{c.forgotten:.2f}"
            numbers = (f"{c.contrast:.2f}", str(c.rows), forgotten, f"{c.harm:+.3f}")
            table.add_row(c.feature.name, c.feature.place, *numbers, c.verdict, " ".join(c.tokens[:6]))
        if more := len(self.candidates) - most:
            table.caption = f"and {more} more" if more > 0 else None
        return table


# -- what is recorded ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recording:
    """What the MLPs add, and which way their neurons go, on texts about the concept and on retained ones.

    states: layer -> (tokens, d), the concept's texts first.  where: place -> (tokens,), true where the concept is
    named, or named next.  retained: (tokens,), true in the retained texts.
    signs:  place -> (layers, neurons): the majority sign of a neuron's activation there, 0 where there is none.
    """

    states: Mapping[int, Float[Tensor, "t d"]]
    where: Mapping[Place, Tensor]
    retained: Tensor
    signs: Mapping[Place, Float[Tensor, "l m"]]


def record(
    model: LanguageModel, texts: Sequence[str], others: Sequence[str], tokens: ConceptTokens, layers: Sequence[int]
) -> Recording:
    """One pass over the texts; sums of signs are kept running (spec, trap 3)."""
    sites = [f"layers.{layer}.{part}" for layer in layers for part in ("mlp_hidden", "mlp_output")]
    rows = model.encode([*texts, *others])
    where = {place: torch.cat([_places(tokens, row, place) for row in rows]) for place in PLACES}
    retained = torch.cat([torch.full((len(row),), n >= len(texts)) for n, row in enumerate(rows)])
    where = {place: mask & ~retained for place, mask in where.items()}
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    width = model.width(f"layers.{layers[0]}.mlp_hidden")
    signs = {place: torch.zeros(model.depth, width) for place in PLACES}
    first = 0
    recorded = model.record([*texts, *others], sites, batch_size=CHUNK)
    for seen in track(recorded, "recording MLPs", -(-len(rows) // CHUNK)):
        count = len(seen[sites[0]])
        for layer in layers:
            states[layer].append(seen[f"layers.{layer}.mlp_output"].cpu())
            hidden = seen[f"layers.{layer}.mlp_hidden"].cpu().float().sign()
            for place in PLACES:
                signs[place][layer] += hidden[where[place][first : first + count]].sum(0)
        first += count
    return Recording(
        {layer: torch.cat(parts) for layer, parts in states.items()},
        where,
        retained,
        {place: total.sign() for place, total in signs.items()},
    )


def _places(tokens: ConceptTokens, row: Sequence[int], place: Place) -> Tensor:
    named = tokens.named(row)
    return named if place == "at" else torch.cat([named[1:], named.new_zeros(1)])


# -- which features stand out ----------------------------------------------------------------------------------


def by_contrast(recording: Recording, layer: int, dictionary: Dictionary, most: int) -> Iterator[Candidate]:
    """The features whose activation on the concept differs most from that on the retained texts.

    A feature that never fires on the concept is left out (the paper's filter by activation).
    """
    codes = dictionary.encode(recording.states[layer].float())
    spread, neutral = codes.std(0).clamp(min=1e-6), codes[recording.retained].mean(0)
    gaps = torch.stack([(codes[recording.where[place]].mean(0) - neutral) / spread for place in PLACES])
    gaps[:, ~(codes[~recording.retained] != 0).any(0)] = 0
    best, place = gaps.abs().max(0)
    for index in best.topk(min(most, len(best))).indices.tolist():
        gap = float(gaps[place[index], index])
        yield Candidate(Feature(layer, index, gap > 0, PLACES[int(place[index])]), abs(gap))


def by_logit_lens(
    model: LanguageModel, tokens: ConceptTokens, layer: int, dictionary: Dictionary, least: int, listed: int = 30
) -> Iterator[Candidate]:
    """Features with at least `least` of the concept's tokens among the `listed` that they raise, or lower, most."""
    for start in range(0, dictionary.width, 4096):  # a catalogue of all features at once would be large
        logits = model.unembed(dictionary.write[start : start + 4096])
        for promotes in (True, False):
            top = logits.topk(listed, largest=promotes).indices
            hits = torch.isin(top, tokens.ids).sum(1)
            for number in (hits >= least).nonzero()[:, 0].tolist():
                yield Candidate(Feature(layer, start + number, promotes), float(hits[number]) / listed)


def raised_tokens(model: LanguageModel, feature: Feature, dictionary: Dictionary, count: int = 8) -> tuple[str, ...]:
    """The tokens that a feature raises most; lowers, where it stands against the concept."""
    logits = model.unembed(dictionary.write[feature.index][None])[0]
    ids = logits.topk(count, largest=feature.promotes).indices.tolist()
    return tuple(model.tokenizer.decode([i]).strip() for i in ids)


# -- what a feature does ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judge:
    """Measures what an edit does to what the model knows of the concept, and to other texts.

    known: for each text, places in the row and the number, among the concept's tokens, of the token that follows.
    """

    model: LanguageModel
    tokens: ConceptTokens
    rows: Sequence[Sequence[int]]
    known: Sequence[tuple[Int[Tensor, " k"], Int[Tensor, " k"]]]
    others: Sequence[Sequence[int]]
    before: tuple[float, float]

    @staticmethod
    def of(
        model: LanguageModel, texts: Sequence[str], others: Sequence[str], tokens: ConceptTokens, most: int
    ) -> Judge:
        """At most `most` texts with something of the concept that the model knows; where it knows nothing, all of it.

        Known: of the tokens that name the concept the model ranks the one that follows first.
        """
        rows = model.encode(texts)
        chunks = list(batches(rows, CHUNK))
        ranked = [right for chunk in track(chunks, "what the model knows") for right in _right(model, tokens, chunk)]
        knows = any(bool(right.any()) for _, _, right in ranked)
        asked = [(place[right | (not knows)], which[right | (not knows)]) for place, which, right in ranked]
        used = sorted((i for i in range(len(rows)) if len(asked[i][0])), key=lambda i: -len(asked[i][0]))[:most]
        used.sort(key=lambda i: int(asked[i][0].max()))
        cut = [rows[i][: int(asked[i][0].max()) + 1] for i in used]
        long = [row for row in model.encode(others, max_length=LONGEST) if len(row) > 1][:most]
        judge = Judge(model, tokens, cut, [asked[i] for i in used], sorted(long, key=len), (0.0, 0.0))
        return replace(judge, before=(judge._known(), judge._kept()))

    def effect(self, applied: AbstractContextManager[object], limit: float) -> tuple[float, float]:
        """(forgotten, harm) of an edit, see `Candidate`; forgotten is NaN where the harm exceeds the limit."""
        with applied:
            harm = self.before[1] - self._kept()
            return (math.nan if harm > limit else self.before[0] - self._known()), harm

    @torch.no_grad()
    def _known(self) -> float:
        """Mean log p of the right one among the concept's tokens, where the model knew it."""
        known: list[Tensor] = []
        for chunk in batches(range(len(self.rows)), CHUNK):
            log_p = self.model.predict([self.rows[i] for i in chunk])
            for number, i in enumerate(chunk):
                place, which = self.known[i]
                among = log_p[number, place - len(self.rows[i])][:, self.tokens.ids].log_softmax(-1)
                known.append(among.gather(1, which[:, None].to(among.device))[:, 0].cpu())
        return float(torch.cat(known).mean())

    def _kept(self) -> float:
        """Mean log p of a token of the other texts."""
        return float(
            torch.cat(self.model.log_likelihoods(self.others, [1] * len(self.others), batch_size=CHUNK)).mean()
        )


def _right(
    model: LanguageModel, tokens: ConceptTokens, rows: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each row: places before naming tokens, their numbers among the concept's, whether they are ranked first."""
    log_p = model.predict(rows)
    for number, row in enumerate(rows):
        place = tokens.named(row)[1:].nonzero()[:, 0]
        which = torch.searchsorted(tokens.ids, torch.tensor(row)[place + 1])
        yield place, which, log_p[number, place - len(row)][:, tokens.ids].argmax(-1).cpu() == which


# -- the choice ------------------------------------------------------------------------------------------------


def choose(
    candidates: Sequence[Candidate],
    effect: Callable[[Sequence[Feature]], tuple[int, float, float]],
    *,
    most: int,
    harm: float,
    veto: Sequence[str] = (),
) -> FeatureSearch:
    """Measure each candidate alone, then add the strongest to one another as long as together they do more.

    effect: features -> (rows, forgotten, harm).  A candidate is dropped when it forgets nothing, when its harm is
    above the limit, or when a person's veto names it; a set of candidates likewise.
    """
    measured = [_judged(c, effect, harm, veto) for c in track(candidates, "effect of each feature")]
    usable = sorted((c for c in measured if not c.verdict), key=lambda c: -c.forgotten)
    taken: list[Feature] = []
    total = (0.0, 0.0)
    for candidate in track(usable[: 4 * most], "choosing features"):
        if len(taken) == most:
            break
        _, forgotten, harmed = effect([*taken, candidate.feature])
        if forgotten > max(1.1 * total[0], 0.0) and harmed <= harm:
            taken, total = [*taken, candidate.feature], (forgotten, harmed)
    found = [replace(c, verdict=c.verdict or (CHOSEN if c.feature in taken else LITTLE)) for c in measured]
    order = sorted(found, key=lambda c: (RANKS.index(c.verdict), c.harm if math.isnan(c.forgotten) else -c.forgotten))
    return FeatureSearch(tuple(order), *total)


def _judged(
    candidate: Candidate,
    effect: Callable[[Sequence[Feature]], tuple[int, float, float]],
    limit: float,
    veto: Sequence[str],
) -> Candidate:
    rows, forgotten, harm = effect([candidate.feature])
    verdict = ""
    if candidate.feature.name in veto:
        verdict = VETOED
    elif harm > limit:
        verdict = HARMS
    elif forgotten <= 0:
        verdict = NOTHING
    return replace(candidate, rows=rows, forgotten=forgotten, harm=harm, verdict=verdict)


def sampled(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most `count` of the texts, in random order."""
    return random.Random(seed).sample(list(texts), min(count, len(texts)))
