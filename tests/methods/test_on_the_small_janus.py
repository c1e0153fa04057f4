"""Behaviour on the trained Janus that ships: the erased object is not drawn any more, others are."""

import pytest
import torch

from conceptx import Concept, load
from conceptx.methods import EAR, LEACE, UCE
from conceptx.places import tasks_folder
from conceptx.settings import read_recipe
from conceptx.testbeds import emoji, janus

OTHERS = ("wolf", "rose", "pizza", "violin", "airplane", "star", "owl", "banana")
DOG = ("the dog in noto", "dog as fluent emoji", "a twemoji picture of a dog", "a drawing of a dog")  # never trained on


@pytest.fixture(scope="module")
def model():
    return load(janus.NAME)


@pytest.fixture(scope="module")
def dog():
    return Concept.load(tasks_folder() / "concepts" / "dog.toml")


def seen(model, prompts, names):
    """The share of pictures, four a prompt, on which the judge sees the name that belongs to the prompt."""
    images = model.generate([p for p in prompts for _ in range(4)], seeds=range(4 * len(prompts)))
    wanted = torch.tensor([emoji.OBJECT_NAMES.index(name) for name in names for _ in range(4)])
    return float((emoji.judges().objects(images).argmax(1) == wanted).float().mean())


def kept(model):
    return seen(model, [f"a drawing of {emoji.vocabulary.article(name)}" for name in OTHERS], OTHERS)


def test_ear_takes_the_dog_out_and_leaves_the_others(model, dog):
    """With the recipe, one pass over the pairs: 16 pictures of the dog, 32 of others (a standard error of .05)."""
    assert seen(model, DOG, ["dog"] * 4) > 0.9 and kept(model) > 0.85
    recipe = read_recipe(tasks_folder() / "recipes" / "janus" / "ear.toml")
    edit = EAR.from_settings(recipe).erase(model, dog)
    with edit.applied(model):
        assert seen(model, DOG, ["dog"] * 4) < 0.2
        assert kept(model) > 0.7


def test_uce_draws_the_anchor_instead_from_the_rows_of_the_prompt(model, dog):
    """Measured once: no dog, a cat on .63 of 16 pictures (standard error .12)."""
    edit = UCE().erase(model, dog)
    assert list(edit.maps) == ["text"] and not edit.deltas
    with edit.applied(model):
        assert seen(model, DOG, ["dog"] * 4) < 0.1 and seen(model, DOG, ["cat"] * 4) > 0.4
        assert kept(model) > 0.85


def test_a_vector_eraser_at_one_site_is_folded_and_leaves_the_pictures(model, dog):
    """A single direction of one site says little about what is drawn: the guard is on linear probes there."""
    edit = LEACE().erase(model, dog, sites=["layers.2.mlp_input"])
    images = model.generate(DOG, seeds=range(4), temperature=0)
    with edit.applied(model):
        mapped = model.generate(DOG, seeds=range(4), temperature=0)
    with edit.fold(model).applied(model):
        folded = model.generate(DOG, seeds=range(4), temperature=0)
    assert not torch.equal(mapped, images)
    assert (mapped - folded).abs().mean() < 0.02  # rounding may turn a token
