"""ECGVF: the filter's properties (spec, section 6), its sources, its files."""

import json
import random

import pytest
import torch
from hosts import tiny_janus, tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptx import Concept
from conceptx.concept import pairs_of
from conceptx.evaluation.visual_filter import template_pairs, visual_filter, written_pairs

DOG = Concept("dog", anchor="cat", synonyms=("puppy",))
PAIRS = [(f"a dog {n}", f"a cat {n}") for n in range(12)]


def generate(prompts, *, seeds):
    """Pictures whose level is a fixed function of prompt and seed: high for most dogs, low for most cats."""
    levels = [random.Random(f"{prompt} {seed}").random() for prompt, seed in zip(prompts, seeds, strict=True)]
    shifts = [0.1 if "dog" in prompt else -0.1 for prompt in prompts]
    pictures = [torch.full((3, 4, 4), level + shift) for level, shift in zip(levels, shifts, strict=True)]
    return torch.stack(pictures).clamp(0, 1)


def present(images):
    return images.mean((1, 2, 3))


def filtered(threshold, pairs=PAIRS, images=2):
    return visual_filter(pairs, generate, present, threshold=threshold, images=images)


def test_every_pair_has_one_verdict_and_the_verdict_follows_from_the_scores():
    found = filtered(0.5)
    assert [row.pair for row in found.rows] == PAIRS
    for row in found.rows:
        wanted = "weak" if row.shown < 0.5 else "leaking" if row.leaked >= 0.5 else "kept"
        assert row.verdict == wanted
    assert len(found.of("weak")) and len(found.of("leaking")) and len(found.kept)


def test_what_was_kept_is_kept_again():
    once = filtered(0.5)
    assert filtered(0.5, once.kept).kept == once.kept


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 0.8), st.floats(0.2, 0.8))
def test_a_lower_threshold_drops_fewer_weak_ones_and_shows_more_leaks(first, second):
    low, high = sorted((first, second))
    rows = {}
    for threshold in (low, high):
        try:
            rows[threshold] = filtered(threshold).rows
        except ValueError:
            return
    for below, above in zip(rows[low], rows[high], strict=True):
        assert (below.shown < low) <= (above.shown < high) and (above.leaked >= high) <= (below.leaked >= low)


def test_nothing_left_is_an_error_with_both_counts():
    with pytest.raises(ValueError, match=r"No pair is left of 12: 12 do not show the concept, 0 show it"):
        visual_filter(PAIRS, generate, lambda images: torch.zeros(len(images)))
    with pytest.raises(ValueError, match=r"No pair is left of 12: 0 do not show the concept, 12 show it"):
        visual_filter(PAIRS, generate, lambda images: torch.ones(len(images)))
    with pytest.raises(ValueError, match="no pair of prompts"):
        visual_filter([], generate, present)
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\], got 2 and 1.5"):
        visual_filter(PAIRS, generate, present, threshold=1.5, images=2)


def test_kept_pairs_go_through_a_file_into_a_concept(tmp_path):
    found = filtered(0.5)
    found.save(tmp_path / "pairs.jsonl")
    found.save_report(tmp_path / "report.json")
    assert len(json.loads((tmp_path / "report.json").read_text())) == len(PAIRS)
    (tmp_path / "dog.toml").write_text('name = "dog"\npairs_file = "pairs.jsonl"\n')
    concept = Concept.load(tmp_path / "dog.toml")
    assert list(concept.pairs) == found.kept == list(pairs_of(concept))
    (tmp_path / "pairs.jsonl").write_text('{"with": "a dog"}\n')
    with pytest.raises(ValueError, match=r'line 1: expected \{"with": \.\.\., "without": \.\.\.\}'):
        Concept.load(tmp_path / "dog.toml")


@pytest.mark.parametrize("make", [tiny_janus, tiny_pipeline])
def test_it_runs_on_every_model_that_draws(make):
    found = visual_filter(PAIRS[:1], make().generate, _dog_first(), images=1)
    assert found.kept == PAIRS[:1]


def _dog_first():
    """Says yes to the first picture that it sees, and no to all others."""
    return lambda images: (torch.arange(len(images)) == 0).float()


# -- sources -----------------------------------------------------------------------------------------------------------


def test_templates_meet_every_replacement():
    assert template_pairs(["a {}", "the {} at night"], "dog", ["cat", "bench"]) == [
        ("a dog", "a cat"),
        ("a dog", "a bench"),
        ("the dog at night", "the cat at night"),
        ("the dog at night", "the bench at night"),
    ]
    with pytest.raises(ValueError, match="got 'a dog'"):
        template_pairs(["a dog"], "dog", ["cat"])


class Scribe:
    """A writer that gives prepared texts, one a call."""

    def __init__(self, *texts):
        self.texts, self.seeds = list(texts), []

    def generate(self, prompts, *, max_new_tokens, seed):
        self.seeds.append(seed)
        assert prompts[0].endswith("3.") and "dog in the snow -> cat in the snow" in prompts[0]
        return [self.texts[len(self.seeds) - 1]]


def test_of_what_a_model_writes_only_pairs_are_taken():
    scribe = Scribe(
        " a dog on a sofa -> a cat on a sofa\n4. no arrow\n5. a cat -> a cat\n6. a dog -> a puppy\n7. Puppy -> kitten",
        " a dog on a sofa -> a cat on a sofa\n4. the dog's bone -> the cat's bone",
    )
    assert written_pairs(scribe, DOG, 3, seed=7) == [
        ("a dog on a sofa", "a cat on a sofa"), ("Puppy", "kitten"), ("the dog's bone", "the cat's bone"),
    ]  # fmt: skip
    assert scribe.seeds == [7, 8]
    with pytest.raises(ValueError, match="In 1 calls the model wrote no pair on 'dog'"):
        written_pairs(Scribe("nothing"), DOG, 3, calls=1)
    with pytest.raises(ValueError, match="needs the concept's anchor"):
        written_pairs(scribe, Concept("dog"), 3)
