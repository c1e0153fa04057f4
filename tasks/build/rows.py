"""Questions: who is seen, who is tested, which wrong options stand beside the answer."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

OPTIONS = 4


@dataclass(frozen=True)
class Question:
    member: str  # the thing asked about
    text: str  # the beginning of a sentence which the answer completes
    answer: str
    wrong: tuple[str, ...]  # candidates, the best first
    aliases: tuple[str, ...] = ()  # further answers that are right in the open form


def halves(members: Sequence[str], seen: Collection[str]) -> set[str]:
    """The members of the test half: every second of the seen ones and every second of the others."""
    groups = [m for m in members if m in seen], [m for m in members if m not in seen]
    return {m for group in groups for m in group[::2]}


def rows(questions: Sequence[Question], seen: Collection[str], name: str) -> list[dict]:
    """The rows of one half. The answer stands equally often in each of the four places."""
    dice = random.Random(f"places of {name}")
    places = [i % OPTIONS for i in range(len(questions))]
    dice.shuffle(places)
    return [_row(q, place, q.member in seen) for q, place in zip(questions, places, strict=True)]


def _row(question: Question, place: int, seen: bool) -> dict:
    choices = [w for w in question.wrong if w != question.answer][: OPTIONS - 1]
    if len(set(choices)) != OPTIONS - 1:
        raise ValueError(f"{question.text!r} has too few wrong options: {question.wrong}")
    choices.insert(place, question.answer)
    return {
        "question": question.text,
        "choices": choices,
        "answer": place,
        "aliases": list(dict.fromkeys((question.answer, *question.aliases))),
        "member": question.member,
        "seen": seen,
    }


def shuffled(candidates: Iterable[str], *key: str) -> list[str]:
    """In an order that depends on the key alone."""
    unique = sorted(set(candidates))
    random.Random("|".join(key)).shuffle(unique)
    return unique


def finder(names: Iterable[str]) -> re.Pattern[str]:
    """Matches whole names; of two that overlap the longer one ("Equatorial Guinea", not "Guinea")."""
    ordered = sorted(set(names), key=lambda name: (-len(name), name))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w)", re.IGNORECASE)


def mentioned(text: str, pattern: re.Pattern[str]) -> set[str]:
    return {match.casefold() for match in pattern.findall(text)}
