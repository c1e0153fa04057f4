"""Probes on the layers of a language model."""

from __future__ import annotations

import pytest
import torch
from hosts import GARDEN, METALS, same, state, tiny

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.probing import probe_layers
from conceptx.geometry import Subspace

MANY = [[f"{a} and {b}" for a in kind for b in kind] for kind in (METALS, GARDEN)]
CONCEPT = Concept("metals", texts=MANY[0], retain_texts=MANY[1])


def test_two_unlike_kinds_of_texts_are_told_apart_on_the_layers_that_are_asked_for():
    model = tiny()
    report = probe_layers(model, CONCEPT)
    assert [s.task for s in report.scores[::2]] == ["layers.0.output", "layers.2.output"]
    assert {s.metric for s in report.scores} == {"linear_probe", "mlp_probe"}
    assert all(s.value > 0.95 and s.n == 36 and s.chance == 0.5 for s in report.scores)
    asked = probe_layers(model, CONCEPT, sites=["layers.1.mlp_hidden", "layers.0.mlp_input"], texts=9)
    assert [s.task for s in asked.scores[::2]] == ["layers.0.mlp_input", "layers.1.mlp_hidden"]
    assert {s.n for s in asked.scores} == {8}


def test_an_edit_that_takes_everything_leaves_chance_beside_the_unedited_value():
    """Behind a map to one point nothing can be read; the layer before it is as it was."""
    model = tiny()
    before = state(model)
    nothing = Subspace.orthogonal(torch.eye(model.width("layers.1.output"), dtype=torch.float64)).removal()
    edit = Edit(model.fingerprint, maps={"layers.1.output": (nothing,)})
    report = probe_layers(model, CONCEPT, edit=edit, sites=["layers.0.output", "layers.1.output"])
    first, _, second, _ = report.scores
    assert first.value == first.unedited > 0.95
    assert second.value == 0.5 and second.unedited > 0.95
    assert same(state(model), before) and not model.applied


def test_labels_without_a_difference_are_guessed():
    """The same texts in other words on both sides: about chance, within three standard errors."""
    texts = [text for kind in MANY for text in kind]
    mixed = Concept("x", texts=texts[::2], retain_texts=texts[1::2])
    (linear, _) = probe_layers(tiny(), mixed, sites=["layers.2.output"]).scores
    assert abs(linear.value - 0.5) < 3 * 0.5 / linear.n**0.5


def test_the_seed_draws_the_texts():
    found = [probe_layers(tiny(), CONCEPT, sites=["layers.0.output"], texts=12, seed=seed) for seed in (0, 0)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: probe_layers(m, Concept("x", texts=["a"] * 3)),
            ValueError,
            "at least 4 texts and retain_texts, 'x' has 3 and 0",
        ),
        (lambda m: probe_layers(m, CONCEPT, sites=[]), ValueError, "No site was given"),
        (lambda m: probe_layers(m, CONCEPT, sites=["layers.9.output"]), KeyError, "There is no site"),
    ],
)
def test_what_cannot_be_probed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny())


def test_another_edit_in_force_is_refused():
    model = tiny()
    edit = Edit(model.fingerprint)
    with edit.applied(model), pytest.raises(ValueError, match="An edit is in force"):
        probe_layers(model, CONCEPT)
