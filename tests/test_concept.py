"""What is read out of a concept: names as whole words, and pairs of prompts. (Files are in test_malformed.py.)"""

from __future__ import annotations

import pytest

from conceptx.concept import Concept, pairs_of
from conceptx.words import whole_words

DOG = Concept("dog", kind="object", anchor="cat", prompts=("a noto dog", "a dog"))


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        (["dog"], "a Dog, a dogma; hot dog", ["Dog", "dog"]),
        (["dog"], "hotdog dogs dog_ dog2", []),
        (["dog", "hot dog"], "a hot dog and a dog", ["hot dog", "dog"]),  # the longer where both begin
        (["ice", "ice cream"], "ice cream", ["ice cream"]),
        (["C++", "a.b"], "c++ axb A.B", ["c++", "A.B"]),  # no pattern in a name
        ([" été ", " "], "un Été", ["Été"]),
    ],
)
def test_names_are_found_as_whole_words(names: list[str], text: str, found: list[str]) -> None:
    assert [match[0] for match in whole_words(*names).finditer(text)] == found


@pytest.mark.parametrize("names", [[], [""], [" ", ""]])
def test_a_blank_name_is_found_nowhere(names: list[str]) -> None:
    assert not whole_words(*names).search("a dog ")


def test_pairs_are_the_concepts_own_or_its_prompts_with_the_anchor() -> None:
    assert pairs_of(DOG) == [("a noto dog", "a noto cat"), ("a dog", "a cat")]
    assert pairs_of(Concept("dog", anchor="cat")) == [("dog", "cat")]
    own = (("a dog", "a bench"),)
    assert pairs_of(Concept("dog", anchor="cat", pairs=own)) == own
    with pytest.raises(ValueError, match="Pairs of prompts need an anchor, or to be given"):
        pairs_of(Concept("dog"))
    with pytest.raises(ValueError, match="'a puppy' does not hold 'dog'"):
        pairs_of(Concept("dog", anchor="cat", prompts=("a puppy",)))
