"""The real language model from its package: it loads, it knows Paris, and linear erasers scrub it layer by layer."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from conceptx.concept import Concept
from conceptx.eraser import VectorEraser, labelled_states, labelled_texts
from conceptx.methods import LEACE, RLACE
from conceptx.models import LanguageModel, load

WORK = ("nurse", "doctor", "teacher", "pilot", "baker", "judge")
GENDER = Concept(
    "gender",
    kind="attribute",
    classes={
        "female": [f"{who} works as a {job} and likes it." for who, job in product(("She", "Mary", "My mother"), WORK)],
        "male": [f"{who} works as a {job} and likes it." for who, job in product(("He", "John", "My father"), WORK)],
    },
)
SITES = ["layers.6.mlp_input", "layers.7.attention_input", "layers.7.mlp_input"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("smollm2")


def gap_of_means(model: LanguageModel, site: str) -> float:
    """How far apart the two classes' mean activations are, in units of the activations' spread."""
    states, z = labelled_states(model, *labelled_texts(GENDER), site)
    gap = states[z == 0].double().mean(0) - states[z == 1].double().mean(0)
    return float(gap.norm() / states.double().std(0).norm())


def test_it_knows_the_capital_of_france(model: LanguageModel) -> None:
    assert "Paris" in model.generate(["The capital of France is"], max_new_tokens=4)[0]


@pytest.mark.parametrize("eraser", [LEACE(), RLACE()], ids=["LEACE", "RLACE"])
def test_scrubbing_makes_the_class_means_equal_at_every_site(model: LanguageModel, eraser: VectorEraser) -> None:
    """Equal class means are what no linear probe can get round (LEACE, section 3), here inside a running model."""
    before = [gap_of_means(model, site) for site in SITES]
    edit = eraser.erase(model, GENDER, sites=SITES)
    with edit.applied(model):
        after = [gap_of_means(model, site) for site in SITES]
    assert min(before) > 0.02
    # float32 activations: 1e-7 of their size, and the means are of some hundred tokens
    assert max(after) < 1e-5
    assert [gap_of_means(model, site) for site in SITES] == before


def test_folded_scrubbing_is_the_same_model(model: LanguageModel) -> None:
    edit = LEACE().erase(model, GENDER, sites=SITES)
    rows = model.encode(["My mother works as a pilot.", "The capital of France is Paris."])
    with edit.applied(model):
        mapped = model.predict(rows, last=4)
    folded = edit.fold(model)
    assert not folded.maps
    with folded.applied(model):
        # float32 through thirty layers
        torch.testing.assert_close(model.predict(rows, last=4), mapped, atol=2e-3, rtol=0)
    assert not torch.equal(model.predict(rows, last=4), mapped)
