"""The reader against a file written here, then the installed vectors and the gender split."""

import numpy as np
import pytest

from conceptx.testbeds.word2vec import (
    SIMILARITY_FILES,
    WordVectors,
    analogy_questions,
    gender_bias,
    gender_split,
    load,
    read_binary,
    similarity_pairs,
    weat_tests,
    word_lists,
)


@pytest.fixture(scope="module")
def vectors():
    return load()


@pytest.fixture(scope="module")
def split(vectors):
    return gender_split(vectors, seed=0)


def written(path, rows, separator=b""):
    body = b"".join(word.encode() + b" " + row.tobytes() + separator for word, row in rows.items())
    path.write_bytes(f"{len(rows)} {len(next(iter(rows.values())))}\n".encode() + body)
    return path


@pytest.mark.parametrize("separator", [b"", b"\n"])  # both are found in the wild
def test_reads_back_what_was_written_even_bytes_that_look_like_text(tmp_path, separator):
    blanks = np.frombuffer(b" \n \n \n \n", "<f4")  # a vector whose bytes are blanks and line ends
    rows = {"blank": blanks, "café": np.array([1.5, -2], "<f4")}
    read = read_binary(written(tmp_path / "v.bin", rows, separator))
    assert read.words == ("blank", "café")
    assert np.array_equal(read.vectors, np.stack(list(rows.values())))


@pytest.mark.parametrize("cut", [1, 10])
def test_a_file_that_ends_early_is_refused(tmp_path, cut):
    path = written(tmp_path / "v.bin", {"a": np.ones(2, "<f4"), "b": np.ones(2, "<f4")})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="ends"):
        read_binary(path)


def test_words_and_rows_must_match():
    with pytest.raises(ValueError, match="2 words need as many rows"):
        WordVectors(("a", "b"), np.ones((3, 2)))
    with pytest.raises(ValueError, match="more than once"):
        WordVectors(("a", "a"), np.ones((2, 2)))


def test_nearest_is_by_cosine_and_leaves_the_word_out():
    toy = WordVectors(("east", "far_east", "north", "west"), np.array([[1, 0], [9, 1], [0, 1], [-1, 0]], float))
    assert toy.nearest("east", 3) == ("far_east", "north", "west")
    assert toy.with_vectors(-toy.vectors).nearest("east", 1) == ("far_east",)


def test_a_zero_vector_stays_zero():
    assert np.array_equal(WordVectors(("a", "b"), np.array([[0.0, 0], [3, 4]])).unit, [[0, 0], [0.6, 0.8]])


def test_the_installed_vectors(vectors):
    assert vectors.vectors.shape == (26423, 300)
    assert np.allclose(np.linalg.norm(vectors.vectors, axis=1), 1, atol=1e-5)  # float32 at unit length
    assert "nurses" in vectors.nearest("nurse", 3)
    assert np.array_equal(vectors.rows(["he", "she"]), np.stack([vectors["he"], vectors["she"]]))


def test_an_unknown_word_names_close_ones(vectors):
    with pytest.raises(KeyError, match=r"'nursee' among 26423 words; close: nurse"):
        vectors["nursee"]
    with pytest.raises(KeyError, match="none is close"):
        vectors["qqqqzzzz"]
    assert "nursee" not in vectors and "nurse" in vectors


def test_word_lists_and_tests_hold_what_the_papers_list(vectors):
    lists = word_lists()
    assert len(lists.definitional_pairs) == 10 and ("she", "he") in lists.definitional_pairs
    assert all(word in vectors for pair in lists.definitional_pairs for word in pair)
    assert len(lists.professions) == 320 and len(lists.equalize_pairs) == 52 and len(lists.specific) == 1441
    assert [tuple(test.targets) for test in weat_tests()][5:8] == [
        ("Male names", "Female names"),
        ("Math", "Arts"),
        ("Science", "Arts"),
    ]


def test_similarity_files_and_analogies():
    sizes = {name: len(similarity_pairs(name)) for name in SIMILARITY_FILES}
    assert sizes == {"SimLex-999": 999, "MEN": 2997, "WS-353": 353, "MTurk-771": 770, "RW": 2034}
    assert ("old", "new", 1.58) in similarity_pairs("SimLex-999")
    google = analogy_questions("Google")
    assert len(google) == 14 and sum(map(len, google.values())) == 19544
    assert len(analogy_questions("MSR")["all"]) == 8000
    with pytest.raises(KeyError, match="available: SimLex-999"):
        similarity_pairs("SimLex")


def test_split_is_balanced_disjoint_and_biased_as_labelled(vectors, split):
    parts = (split.train, split.dev, split.test)
    assert [len(part) for part in parts] == [2450, 1050, 1500]
    words = [word for part in parts for word in part.words]
    assert len(set(words)) == 5000
    assert sum(part.z.sum() for part in parts) == 2500
    bias = dict(zip(vectors.words, gender_bias(vectors), strict=True))
    for part in parts:
        assert all((bias[word] > 0) == label for word, label in zip(part.words, part.z, strict=True))
        assert np.array_equal(part.x, vectors.rows(part.words))
    assert min(split.margins) > 0.07  # INLP calls less than .03 neutral
    assert {"he", "she"} <= set(words)


def test_no_word_left_out_is_more_biased(vectors, split):
    words = {word for part in (split.train, split.dev, split.test) for word in part.words}
    rest = gender_bias(vectors)[[word not in words for word in vectors.words]]
    assert rest.max() <= split.margins[0] and -rest.min() <= split.margins[1]


def test_split_depends_on_the_seed_alone(vectors, split):
    assert gender_split(vectors, seed=0).test.words == split.test.words
    assert gender_split(vectors, seed=1).test.words != split.test.words


def test_too_many_words_a_side_are_refused(vectors):
    with pytest.raises(ValueError, match="not 12000 words"):
        gender_split(vectors, per_side=12000)
    for per_side in (0, 14000):
        with pytest.raises(ValueError, match=f"half of 26423 words, got {per_side}"):
            gender_split(vectors, per_side=per_side)


def test_odd_tokens_are_left_out():
    words = ("he", "she", "he1", "s-he", "a_b", "x" * 20, "y" * 19)
    toy = WordVectors(words, np.array([[1, 1], [-1, 1], [3, 1], [3, 1], [2, 1], [3, 1], [-2, 1]], float))
    split = gender_split(toy, per_side=2)
    kept = {*split.train.words, *split.dev.words, *split.test.words}
    assert kept == {"he", "a_b", "she", "y" * 19}
    with pytest.raises(ValueError, match="not 3 words on either side"):
        gender_split(toy, per_side=3)
