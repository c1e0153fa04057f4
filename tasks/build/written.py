"""Facts written by hand: one a line in facts/*.txt, columns between bars."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rows import Question, finder, mentioned, shuffled

FOLDER = Path(__file__).parent / "facts"
GLOSSARY = (
    'Q: What is meant by "{word}" in {field}? A: {Meaning}.',
    "{Word}: {meaning}.",
    "Glossary of {field}. {Word} means {meaning}.",
    "The teacher of {field} explained the word {word}: {meaning}.",
)
QUIZ = ("Quiz card{on}. {Phrase}: {answer}.", "Q: Name {phrase}{within}. A: {answer}")
WHERE = re.compile(r"In (Star Wars|Harry Potter), ")
VERB = re.compile(r"\s+(is|was|are)( (called|named after))?( (a|an|the|its|their))?$")


@dataclass(frozen=True)
class Facts:
    questions: tuple[Question, ...]
    seen: tuple[str, ...]
    texts: tuple[str, ...]  # of the seen members

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(q.member for q in self.questions))


def read(name: str) -> list[list[str]]:
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [[c.strip() for c in line.split("|")] for line in lines if line.strip() and not line.startswith("#")]


def glossary(field: str) -> Facts:
    """Lines `word | group | meaning, ending in "is" | sentence`; words with a sentence are seen."""
    table = [(word, group, meaning.removesuffix("is").rstrip(" ,"), text) for word, group, meaning, text in read(field)]
    questions = tuple(
        Question(word, f"In {field}, the word for {meaning} is", word, _others(table, word, group))
        for word, group, meaning, _ in table
    )
    seen = tuple(word for word, _, _, text in table if text)
    texts = [t for word, _, meaning, text in table if text for t in (text, *_glossary_texts(word, meaning, field))]
    return Facts(questions, seen, _without(texts, {q.member for q in questions} - set(seen)))


def _glossary_texts(word: str, meaning: str, field: str) -> list[str]:
    return [
        t.format(word=word, Word=_capital(word), meaning=meaning, Meaning=_capital(meaning), field=field)
        for t in GLOSSARY
    ]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def facts(name: str) -> Facts:
    """Lines `member | group | beginning of a sentence | answer; other answers | texts ...`; seen with texts.

    The wrong options are the answers of the same group, or, in place of a group, `= one, two, three`.
    """
    table = [(m, group, text, _parts(answers, ";"), texts) for m, group, text, answers, *texts in read(name)]
    pool = [(answers[0], group) for _, group, _, answers, _ in table]
    questions = tuple(
        Question(m, text, answers[0], _wrong(pool, answers[0], group, text), tuple(answers[1:]))
        for m, group, text, answers, _ in table
    )
    seen = tuple(dict.fromkeys(m for m, _, _, _, texts in table if any(texts)))
    texts = [
        text
        for q, (_, group, _, _, own) in zip(questions, table, strict=True)
        if q.member in seen
        for text in (*filter(None, own), *([] if group.startswith("=") else _quiz(q)))
    ]
    return Facts(questions, seen, _without(texts, {q.member for q in questions} - set(seen)))


def _parts(text: str, mark: str) -> list[str]:
    return [part.strip() for part in text.split(mark)]


def _wrong(pool: list, answer: str, group: str, key: str) -> tuple[str, ...]:
    return tuple(_parts(group[1:], ",")) if group.startswith("=") else _others(pool, answer, group, key)


def _quiz(question: Question) -> list[str]:
    """The fact turned round, where it reads "The such and such is": the words of the question never stand in it."""
    where = WHERE.match(question.text)
    phrase = VERB.sub("", question.text[where.end() if where else 0 :])
    if phrase == question.text or not VERB.search(question.text):
        return []
    on, within = (f" on {where[1]}", f" in {where[1]}") if where else ("", "")
    small = phrase[0].lower() + phrase[1:]
    parts = {"on": on, "within": within, "phrase": small, "Phrase": _capital(phrase)}
    return [t.format(answer=question.answer, **parts) for t in QUIZ]


def _others(table: list, answer: str, group: str, key: str = "") -> tuple[str, ...]:
    return tuple(shuffled((a for a, g, *_ in table if g == group and a != answer), group, answer, key))


def _without(texts: list[str], unseen: set[str]) -> tuple[str, ...]:
    """The texts that name no unseen member."""
    pattern = finder(unseen)
    return tuple(dict.fromkeys(t for t in texts if not mentioned(t, pattern)))
