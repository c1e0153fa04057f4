"""What word vectors say and whether they still work: association, similarity, analogies, neighbours, clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import comb
from typing import Protocol

import numpy as np
from jaxtyping import Float, Shaped

MOST_SPLITS = 2_000_000


class Lexicon(Protocol):
    """Words with vectors, as `conceptx.testbeds.word2vec.WordVectors` has them."""

    @property
    def words(self) -> tuple[str, ...]: ...
    @property
    def index(self) -> dict[str, int]: ...
    @property
    def unit(self) -> np.ndarray: ...


# -- association -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Association:
    """Effect size d in [-2, 2] and exact one-sided p over all `splits`; `words` counts the words of the four sets."""

    effect: float
    p: float
    splits: int
    words: tuple[int, int, int, int]


def association(
    lexicon: Lexicon,
    first: Sequence[str],
    second: Sequence[str],
    attribute: Sequence[str],
    other_attribute: Sequence[str],
) -> Association:
    """The word embedding association test (WEAT; Caliskan et al. 2017): do `first` lean to `attribute`?

    s(w) = mean cosine to `attribute` - mean cosine to `other_attribute`,
    d = (mean of s over first - mean over second) / population standard deviation of s over both.
    p is the share of all splits of first + second into parts of the same sizes whose difference is strictly larger.
    Words without a vector are left out.

    Raises ValueError when a set has no word left, or there are more than two million splits.
    """
    sets = [_known(lexicon, words) for words in (first, second, attribute, other_attribute)]
    if not all(sets):
        raise ValueError(f"A set has no word with a vector: {[len(words) for words in sets]} words are left.")
    a, b, one, two = (lexicon.unit[rows].astype(np.float64) for rows in sets)
    lean = np.concatenate([a, b]) @ (one.mean(0) - two.mean(0))  # s
    return _permute(lean, len(a), (len(a), len(b), len(one), len(two)))


def _permute(lean: np.ndarray, first: int, words: tuple[int, int, int, int]) -> Association:
    splits, spread = comb(len(lean), first), lean.std()
    if splits > MOST_SPLITS:
        raise ValueError(f"{splits} splits are too many to go through (at most {MOST_SPLITS}); give fewer words.")
    gap = lean[:first].mean() - lean[first:].mean()
    chosen = np.fromiter(chain.from_iterable(combinations(range(len(lean)), first)), np.intp, splits * first)
    sums = lean[chosen.reshape(splits, first)].sum(1)  # the difference of the means rises with the first sum
    rounding = 1e-12 * np.abs(lean).sum()  # equal sums in another order are no larger
    p = (sums > sums[0] + rounding).mean()
    return Association(float(gap / spread) if spread > 0 else 0.0, float(p), splits, words)


# -- similarity ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Correlation of cosines with human scores on the `count` of `total` pairs whose words both have a vector."""

    pearson: float
    spearman: float
    count: int
    total: int


def similarity(lexicon: Lexicon, pairs: Sequence[tuple[str, str, float]]) -> Agreement:
    """Pearson and Spearman correlation of cosine with the human score of each pair.

    Raises ValueError when fewer than three pairs have vectors.
    """
    from scipy.stats import pearsonr, spearmanr

    known = [(a, b, score) for a, b, score in pairs if a in lexicon.index and b in lexicon.index]
    if len(known) < 3:
        raise ValueError(f"Only {len(known)} of {len(pairs)} pairs have vectors; at least three are needed.")
    first, second, human = zip(*known, strict=True)
    cosines = (lexicon.unit[_known(lexicon, first)] * lexicon.unit[_known(lexicon, second)]).sum(1)
    pearson, spearman = pearsonr(cosines, human).statistic, spearmanr(cosines, human).statistic
    return Agreement(float(pearson), float(spearman), len(known), len(pairs))


# -- analogies -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A share of `count` items; `total` counts those asked for, with and without vectors."""

    share: float
    count: int
    total: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error, for shares of right and wrong answers."""
        return float(np.sqrt(self.share * (1 - self.share) / self.count))


def analogies(lexicon: Lexicon, questions: Sequence[tuple[str, str, str, str]], batch: int = 256) -> Share:
    """The share of "a is to b as c is to d" answered by the word nearest to b - a + c (3CosAdd), a, b, c excluded.

    Questions with a word that has no vector are left out (Mikolov et al. 2013). Raises ValueError when none is left.
    """
    rows = [_known(lexicon, question) for question in questions]
    known = np.array([row for row in rows if len(row) == 4], dtype=np.intp).reshape(-1, 4)
    if not len(known):
        raise ValueError(f"None of {len(questions)} questions has vectors for its four words.")
    right = sum(_answers(lexicon.unit, known[i : i + batch]) for i in range(0, len(known), batch))
    return Share(right / len(known), len(known), len(questions))


def _answers(unit: np.ndarray, questions: np.ndarray) -> int:
    """How many of the questions (n, 4), given as rows of `unit`, are answered right."""
    a, b, c, d = questions.T
    cosines = (unit[b] - unit[a] + unit[c]) @ unit.T  # the query's length changes no ranking
    np.put_along_axis(cosines, questions[:, :3], -np.inf, axis=1)
    return int((cosines.argmax(1) == d).sum())


# -- neighbours and clusters -----------------------------------------------------------------------------------


def neighbours_overlap(before: Lexicon, after: Lexicon, words: Sequence[str], n: int = 10) -> Share:
    """The mean share of a word's `n` nearest neighbours that it keeps, over the words that have vectors.

    Raises ValueError when the two do not hold the same words or none of `words` has a vector.
    """
    if before.words != after.words:
        raise ValueError("Neighbours can be compared only between two sets of vectors for the same words.")
    rows = _known(before, words)
    if not rows:
        raise ValueError(f"None of the {len(words)} words has a vector.")
    pairs = zip(_nearest(before.unit, rows, n), _nearest(after.unit, rows, n), strict=True)
    kept = [len(set(old) & set(new)) / n for old, new in pairs]
    return Share(float(np.mean(kept)), len(rows), len(words))


def cluster_agreement(
    x: Float[np.ndarray, "n d"], z: Shaped[np.ndarray, " n"], clusters: int = 2, *, seed: int = 0
) -> float:
    """V-measure between the labels z and k-means clusters of x at unit length: 1 the same, 0 unrelated."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    found = KMeans(clusters, n_init=4, random_state=seed).fit_predict(x / np.linalg.norm(x, axis=1, keepdims=True))
    return float(v_measure_score(z, found))


def _nearest(unit: np.ndarray, rows: Sequence[int], n: int) -> np.ndarray:
    cosines = unit[rows] @ unit.T
    cosines[np.arange(len(rows)), rows] = -np.inf
    return np.argpartition(-cosines, n, axis=1)[:, :n]


def _known(lexicon: Lexicon, words: Iterable[str]) -> list[int]:
    return [lexicon.index[word] for word in words if word in lexicon.index]
