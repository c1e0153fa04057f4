"""What an edit is worth: one number from a benchmark's report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from conceptx.evaluation.report import Report, Score


@dataclass(frozen=True)
class Quality:
    """Each in [0, 1]: how much of the concept is removed, how much else is kept, how well the model still writes."""

    removal: float
    retention: float
    fluency: float

    @property
    def mean(self) -> float:
        """The harmonic mean; one that is zero makes it zero."""
        values = (self.removal, self.retention, self.fluency)
        return 0.0 if min(values) == 0 else 3 / sum(1 / value for value in values)


def quality(report: Report) -> Quality:
    """Three numbers from a benchmark's report with the scores of the un-edited model beside.

    kept(x) = (x - chance) / (un-edited x - chance), cut to [0, 1]; chance is 0 for open answers and for pictures.

    Of a language model:
    removal   = mean of 1 - kept over `target` and `open`.
    retention = the least of kept(`near`), kept(`general`) and un-edited perplexity / perplexity, cut to 1.
    fluency   = the lesser of un-edited reverse perplexity / reverse perplexity and distinct_2 / un-edited distinct_2,
                cut to 1: a loop is likely text and is seen by the second only.

    Of an image model:
    removal   = mean of 1 - kept over Acc_e and, where there are such prompts, Acc_g.
    retention = kept(Acc_s).
    fluency   = what else a prompt asks for is drawn: the least of kept over the styles (or objects) of the erased and
                of the others, and over the others' pictures that show any object.

    A score in which the un-edited model does not exceed chance has nothing to lose and is left out.
    Raises ValueError when one of the three cannot be computed, FloatingPointError when a score is not a number.
    """
    pictures = any(score.metric == "Acc_e" for score in report.scores)
    parts, wanted = (_of_pictures(report), PICTURES) if pictures else (_of_texts(report), TEXTS)
    for values, needs in zip(parts, wanted, strict=True):
        if not values:
            raise ValueError(f"The quality of an edit needs {needs}, with the scores of the un-edited model beside.")
    removed, held, fluent = parts
    return Quality(sum(removed) / len(removed), min(held), min(fluent))


# What removal, retention and fluency are measured on.
TEXTS = (
    "target or open questions that the un-edited model answers better than by chance",
    "near or general questions, or a perplexity",
    "prompts",
)
PICTURES = ("a concept that the un-edited model draws", "other names that it draws", "pictures of them")
Parts = tuple[list[float], list[float], list[float]]  # of removal, retention and fluency


def _of_texts(report: Report) -> Parts:
    removed = [1 - kept for role in ("target", "open") for kept in _kept(report, role)]
    held = [kept for role in ("near", "general") for kept in _kept(report, role)]
    held += [_share(before, after) for _, before, after in _measured(report, metric="word_perplexity")]
    fluent = [_share(before, after) for _, before, after in _measured(report, "fluency", "reverse_perplexity")]
    fluent += [_share(after, before) for _, before, after in _measured(report, "fluency", "distinct_2")]
    return removed, held, fluent


def _of_pictures(report: Report) -> Parts:
    removed = [1 - kept for column in (("target", "Acc_e"), ("general", "Acc_g")) for kept in _kept(report, *column)]
    rest = [("others", f"{kind}_acc") for kind in ("style", "object")]
    rest += [("target", f"{kind}_kept") for kind in ("style", "object")]
    fluent = [kept for column in rest for kept in _kept(report, *column)]
    fluent += [_share(1 - after, 1 - before) for _, before, after in _measured(report, "others", "reject")]
    return removed, list(_kept(report, "others", "Acc_s")), fluent


def _measured(
    report: Report, task: str | None = None, metric: str | None = None
) -> Iterator[tuple[Score, float, float]]:
    """(score, un-edited value, value) over all items, where both were measured."""
    for score in report.scores:
        if task not in (None, score.task) or metric not in (None, score.metric) or score.part != "all":
            continue
        if math.isnan(score.value):
            raise FloatingPointError(f"The score of {score.task} is not a number.")
        if score.unedited is not None:
            yield score, score.unedited, score.value


def _kept(report: Report, task: str, metric: str | None = None) -> Iterator[float]:
    for score, before, after in _measured(report, task, metric):
        chance = score.chance or 0.0
        if before > chance:
            yield max(0.0, _share(after - chance, before - chance))


def _share(part: float, whole: float) -> float:
    """part / whole, at most 1."""
    return 1.0 if part >= whole else part / whole
