"""ECGVF, pairs of prompts that differ in the concept for this very model (EAR paper, arXiv 2506.20151; spec, §1 and 6).

A source writes pairs (a prompt with the concept, the same without); the model draws both; a judge drops pairs whose
first prompt does not show the concept and those whose second still does.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from conceptx.concept import Concept
from conceptx.evaluation.image_columns import Judges
from conceptx.models import batches
from conceptx.progress import track
from conceptx.store import write_atomically
from conceptx.words import whole_words

if TYPE_CHECKING:
    from rich.table import Table

Pair = tuple[str, str]
AT_ONCE = 64  # pictures
Verdict = Literal["kept", "weak", "leaking"]
WRITER = """Prompts for pictures, each with {name}, and the same prompt with something else in its place.
1. {name} in the snow -> {anchor} in the snow
2. a small {name} at night -> a small {anchor} at night
"""


class Generator(Protocol):
    def __call__(self, prompts: Sequence[str], *, seeds: Sequence[int]) -> Tensor: ...


class Writer(Protocol):
    """A language model that continues a text, such as a `LanguageModel`."""

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, seed: int) -> list[str]: ...


@dataclass(frozen=True)
class Judged:
    """A pair, the mean presence of the concept in the pictures of both prompts, and what follows.

    verdict: "weak": the first prompt does not show the concept. "leaking": it does, and so does the second.
    """

    pair: Pair
    shown: float
    leaked: float
    verdict: Verdict


@dataclass(frozen=True)
class Filtered:
    """All pairs with their verdicts, in their order."""

    rows: tuple[Judged, ...]

    def of(self, verdict: Verdict) -> list[Pair]:
        """The pairs with that verdict."""
        return [row.pair for row in self.rows if row.verdict == verdict]

    @property
    def kept(self) -> list[Pair]:
        return self.of("kept")

    def table(self) -> Table:
        """For the terminal: every pair, the kept ones first."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        counts = ", ".join(f"{len(self.of(verdict))} {verdict}" for verdict in ("kept", "weak", "leaking"))
        table = Table(title=f"{len(self.rows)} pairs: {counts}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in ("with the concept", "without it"):
            table.add_column(column, overflow="fold")
        for column in ("shown", "leaked", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for row in sorted(self.rows, key=lambda row: row.verdict != "kept"):
            table.add_row(*row.pair, f"{row.shown:.2f}", f"{row.leaked:.2f}", row.verdict)
        return table

    def save(self, path: str | Path) -> None:
        """Write the kept pairs as JSONL, {"with": …, "without": …} a line, which `pairs_file` of a concept reads."""
        lines = "".join(json.dumps({"with": first, "without": second}) + "\n" for first, second in self.kept)
        write_atomically(Path(path), lambda temporary: temporary.write_text(lines, encoding="utf-8"))

    def save_report(self, path: str | Path) -> None:
        """Write every pair with its scores and verdict as JSON."""
        text = json.dumps([asdict(row) for row in self.rows], indent=1)
        write_atomically(Path(path), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def visual_filter(
    pairs: Iterable[Pair],
    generate: Generator,
    present: Callable[[Tensor], Tensor],
    *,
    threshold: float = 0.5,
    images: int = 4,
    seed: int = 0,
) -> Filtered:
    """Draw both prompts of every pair and say which pairs are good for erasing.

    generate:  of an image model: (prompts, seeds) -> pictures (n, 3, h, w) in [0, 1].
    present:   pictures -> (n,) in [0, 1], how much each shows the concept.
    threshold: a prompt shows the concept when the mean over its pictures is at least this.
    images:    pictures of each prompt. Their seeds depend on the prompt and `seed` alone, so that filtering what was
               kept once more keeps all of it.

    Raises ValueError when there is no pair, when images is not positive, when the threshold is not in [0, 1], and when
    nothing is kept (it says how many were dropped why).
    """
    every = list(dict.fromkeys((first, second) for first, second in pairs))
    if not every:
        raise ValueError("There is no pair of prompts to filter.")
    if images < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"images must be positive and threshold in [0, 1], got {images} and {threshold}.")
    prompts = list(dict.fromkeys(prompt for pair in every for prompt in pair))
    scores = dict(zip(prompts, _scores(prompts, generate, present, images, seed), strict=True))
    found = Filtered(tuple(_judged(pair, scores, threshold) for pair in every))
    if not found.kept:
        weak, leaking = len(found.of("weak")), len(found.of("leaking"))
        raise ValueError(
            f"No pair is left of {len(every)}: {weak} do not show the concept, {leaking} show it without its name."
        )
    return found


def _scores(
    prompts: Sequence[str], generate: Generator, present: Callable[[Tensor], Tensor], images: int, seed: int
) -> Iterator[float]:
    """The mean presence of each prompt, several drawn side by side."""
    for some in track(list(batches(prompts, max(1, AT_ONCE // images))), "pairs of prompts"):
        asked = [prompt for prompt in some for _ in range(images)]
        pictures = generate(asked, seeds=[n for prompt in some for n in _seeds(prompt, images, seed)])
        yield from present(pictures).float().view(len(some), images).mean(1).tolist()


def _seeds(prompt: str, count: int, seed: int) -> list[int]:
    draw = random.Random(f"{seed} {prompt}")
    return [draw.getrandbits(31) for _ in range(count)]


def presence(judges: Judges, concept: Concept) -> Callable[[Tensor], Tensor]:
    """How much each picture shows the concept, by the judges: the probability of its name among objects or styles.

    Raises ValueError when they do not know it.
    """
    style = concept.kind == "style"
    known, said = (judges.style_names, judges.styles) if style else (judges.object_names, judges.objects)
    if concept.name not in known:
        raise ValueError(f"The judges know no {concept.kind} {concept.name!r}; they know: {', '.join(known)}.")
    number = list(known).index(concept.name)
    return lambda pictures: said(pictures)[:, number].exp()


def _judged(pair: Pair, scores: dict[str, float], threshold: float) -> Judged:
    shown, leaked = (scores[prompt] for prompt in pair)
    verdict: Verdict = "weak" if shown < threshold else "leaking" if leaked >= threshold else "kept"
    return Judged(pair, shown, leaked, verdict)


# -- sources -----------------------------------------------------------------------------------------------------------


def template_pairs(templates: Sequence[str], name: str, replacements: Sequence[str]) -> list[Pair]:
    """Every template with the name in its braces, and with each of the replacements.

    Raises ValueError when a template has not exactly one pair of braces.
    """
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"A template has {{}} once, for the name; got {wrong[0]!r}.")
    return [(t.format(name), t.format(other)) for t in templates for other in replacements]


def written_pairs(writer: Writer, concept: Concept, count: int, *, calls: int = 20, seed: int = 0) -> list[Pair]:
    """Pairs that a language model writes after two examples; those that do not name the concept in the first prompt
    only are dropped.

    calls: at most; each continues the list with a seed of its own.
    Raises ValueError when the concept has no anchor, or when the model has not written a single usable pair.
    """
    if not (anchor := (concept.anchor or "").strip()):
        raise ValueError(f"Writing pairs needs the concept's anchor; {concept.name!r} has none.")
    task = WRITER.format(name=concept.name, anchor=anchor)
    found: dict[Pair, None] = {}
    for call in range(calls):
        (text,) = writer.generate([task + "3."], max_new_tokens=160, seed=seed + call)
        found |= dict.fromkeys(_read_pairs("3." + text, concept))
        if len(found) >= count:
            break
    if not found:
        raise ValueError(f"In {calls} calls the model wrote no pair on {concept.name!r}.")
    return list(found)[:count]


def _read_pairs(text: str, concept: Concept) -> Iterator[Pair]:
    """The usable lines "n. with -> without"."""
    named = whole_words(concept.name, *concept.synonyms)
    for line in text.splitlines():
        match = re.fullmatch(r"\s*\d+\.\s*(.+?)\s*->\s*(.+?)\s*", line)
        if match and named.search(match[1]) and not named.search(match[2]):
            yield match[1], match[2]
