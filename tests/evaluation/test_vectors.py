"""Every measure against a case worked by hand or another implementation, then on real vectors."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import rankdata

from conceptx.evaluation.vectors import analogies, association, cluster_agreement, neighbours_overlap, similarity
from conceptx.testbeds.word2vec import WordVectors, analogy_questions, load, similarity_pairs


def toy(**vectors):
    return WordVectors(tuple(vectors), np.array(list(vectors.values()), float))


@pytest.fixture(scope="module")
def random_lexicon():
    words = tuple(f"w{i}" for i in range(40))
    return WordVectors(words, np.random.default_rng(0).normal(size=(40, 6)))


# -- association -----------------------------------------------------------------------------------------------


def test_association_by_hand():
    """s = 1, 0 | -1, 0 for words on the axes: d = (.5 + .5) / sqrt(.5), and no split has a larger sum than 1 + 0."""
    words = toy(a1=(2, 0, 0), a2=(0, 0, 1), b1=(0, 3, 0), b2=(0, 0, 5), one=(1, 0, 0), two=(0, 1, 0))
    found = association(words, ["a1", "a2"], ["b1", "b2"], ["one"], ["two"])
    assert found.effect == pytest.approx(1 / np.sqrt(0.5))
    assert (found.p, found.splits, found.words) == (0, 6, (2, 2, 1, 1))


def test_association_is_strict_so_ties_do_not_count():
    words = toy(a=(0, 0, 1), b=(0, 0, 2), c=(0, 0, 3), d=(0, 0, 4), one=(1, 0, 0), two=(0, 1, 0))
    found = association(words, ["a", "b"], ["c", "d"], ["one"], ["two"])
    assert (found.effect, found.p) == (0, 0)  # every split ties with the observed one


def brute_force(lexicon, first, second, one, two):
    """Caliskan et al. 2017 with loops: (effect, p)."""
    cosine = lambda a, b: lexicon[a] @ lexicon[b] / np.linalg.norm(lexicon[a]) / np.linalg.norm(lexicon[b])  # noqa: E731
    lean = {w: np.mean([cosine(w, a) for a in one]) - np.mean([cosine(w, a) for a in two]) for w in first + second}
    statistic = lambda chosen: sum(s if w in chosen else -s for w, s in lean.items())  # noqa: E731
    larger = [statistic(chosen) > statistic(first) + 1e-12 for chosen in combinations(first + second, len(first))]
    gap = np.mean([lean[w] for w in first]) - np.mean([lean[w] for w in second])
    return gap / np.std(list(lean.values())), np.mean(larger)


@pytest.mark.parametrize(("a", "b"), [(4, 4), (3, 5)])
def test_association_agrees_with_brute_force(random_lexicon, a, b):
    words = list(random_lexicon.words)
    first, second, one, two = words[:a], words[a : a + b], words[10:13], words[13:18]
    found = association(random_lexicon, first, second, one, two)
    assert (found.effect, found.p) == pytest.approx(brute_force(random_lexicon, first, second, one, two), abs=1e-12)


def test_swapping_the_attributes_flips_the_effect(random_lexicon):
    first, second, one, two = (random_lexicon.words[i : i + 4] for i in (0, 4, 8, 12))
    there = association(random_lexicon, first, second, one, two)
    back = association(random_lexicon, first, second, two, one)
    assert back.effect == pytest.approx(-there.effect)
    assert back.p + there.p == pytest.approx(1 - 1 / 70)  # no ties: all splits but the observed one


def test_association_leaves_unknown_words_out_and_refuses_an_empty_set(random_lexicon):
    found = association(random_lexicon, ["w0", "none"], ["w1"], ["w2"], ["w3"])
    assert found.words == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\[0, 1, 1, 1\]"):
        association(random_lexicon, ["none"], ["w1"], ["w2"], ["w3"])
    with pytest.raises(ValueError, match="too many"):
        association(random_lexicon, random_lexicon.words[:15], random_lexicon.words[15:30], ["w31"], ["w32"])


# -- similarity ------------------------------------------------------------------------------------------------


def test_similarity_agrees_with_correlations_of_values_and_of_ranks(random_lexicon):
    rng = np.random.default_rng(1)
    pairs = [(*rng.choice(random_lexicon.words, 2), float(rng.integers(5))) for _ in range(50)]  # with ties
    cosines = [
        random_lexicon.unit[random_lexicon.index[a]] @ random_lexicon.unit[random_lexicon.index[b]] for a, b, _ in pairs
    ]
    human = [score for *_, score in pairs]
    found = similarity(random_lexicon, [*pairs, ("w0", "unknown", 1.0)])
    assert found.pearson == pytest.approx(np.corrcoef(cosines, human)[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(rankdata(cosines), rankdata(human))[0, 1])
    assert (found.count, found.total) == (50, 51)


def test_similarity_needs_three_pairs(random_lexicon):
    with pytest.raises(ValueError, match="Only 2 of 3"):
        similarity(random_lexicon, [("w0", "w1", 1.0), ("w1", "w2", 2.0), ("w1", "unknown", 2.0)])


# -- analogies -------------------------------------------------------------------------------------------------


def test_analogy_by_hand():
    """queen - king + man points at woman; without the exclusion the answer to the second would be "man" itself."""
    words = toy(man=(1, 0, 0), woman=(1, 1, 0), king=(1, 0, 1), queen=(1, 1, 1), other=(-1, 0.2, 0))
    right, wrong = ("king", "queen", "man", "woman"), ("man", "man", "man", "other")
    assert analogies(words, [right]).share == 1
    assert analogies(words, [wrong]).share == 0
    found = analogies(words, [right, wrong, ("king", "queen", "man", "unknown")])
    assert (found.share, found.count, found.total) == (0.5, 2, 3)
    assert found.standard_error == pytest.approx(np.sqrt(0.25 / 2))


def test_analogies_do_not_depend_on_batches_and_agree_with_a_loop(random_lexicon):
    rng = np.random.default_rng(2)
    unit, index = random_lexicon.unit, random_lexicon.index
    expected, questions = [], []
    for _ in range(30):
        a, b, c, d = rng.choice(random_lexicon.words, 4, replace=False)
        target = unit[index[b]] - unit[index[a]] + unit[index[c]]
        best = max((w for w in random_lexicon.words if w not in (a, b, c)), key=lambda w: unit[index[w]] @ target)
        questions.append((a, b, c, best if rng.random() < 0.5 else d))
        expected.append(questions[-1][3] == best)
    assert analogies(random_lexicon, questions, batch=7).share == np.mean(expected)
    assert analogies(random_lexicon, questions, batch=100).share == np.mean(expected)


def test_analogies_without_vectors_are_refused(random_lexicon):
    with pytest.raises(ValueError, match="None of 1 questions"):
        analogies(random_lexicon, [("a", "b", "c", "d")])


# -- neighbours and clusters -----------------------------------------------------------------------------------


def test_neighbours_overlap_by_hand():
    before = toy(a=(1, 0), b=(1, 0.1), c=(1, 0.3), d=(0, 1))
    after = before.with_vectors(np.array([[1, 0], [0, 1], [1, 0.3], [1, 0.2]]))
    assert neighbours_overlap(before, before, ["a"], n=2).share == 1
    assert neighbours_overlap(before, after, ["a"], n=2).share == 0.5  # b, c became d, c
    assert neighbours_overlap(before, after, ["a", "none"], n=2).total == 2


def test_neighbours_need_the_same_words(random_lexicon):
    with pytest.raises(ValueError, match="same words"):
        neighbours_overlap(random_lexicon, toy(a=(1, 0)), ["a"])
    with pytest.raises(ValueError, match="None of the 1"):
        neighbours_overlap(random_lexicon, random_lexicon, ["none"])


def test_rotation_and_scale_change_no_score(random_lexicon):
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    turned = random_lexicon.with_vectors(5 * random_lexicon.vectors @ rotation)
    sets = [random_lexicon.words[i : i + 4] for i in (0, 4, 8, 12)]
    assert association(turned, *sets).effect == pytest.approx(association(random_lexicon, *sets).effect)
    assert neighbours_overlap(random_lexicon, turned, random_lexicon.words).share == 1


def test_clusters_find_two_blobs_and_nothing_in_noise():
    rng = np.random.default_rng(4)
    z = np.repeat([0, 1], 100)
    blobs = np.where(z[:, None], 5, -5) * np.eye(3)[0] + rng.normal(size=(200, 3))
    assert cluster_agreement(blobs, z) == 1
    assert cluster_agreement(rng.normal(size=(200, 3)), z) < 0.1


def test_the_installed_vectors_agree_with_people_and_solve_analogies():
    vectors = load()
    assert similarity(vectors, similarity_pairs("MEN")).spearman > 0.7
    family = analogies(vectors, analogy_questions("Google")["family"])
    assert family.count == 420 and family.share > 0.8
