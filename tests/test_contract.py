"""What every method passes for free (design, section 6): all methods on every family that they accept."""

import dataclasses
import inspect
import json
import re
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hosts import (
    ALL,
    GARDEN,
    JANUS,
    METALS,
    PIPELINES,
    host,
    said,
    same,
    scores,
    state,
    tiny,
    tiny_janus,
    tiny_pipeline,
)
from methods.dictionaries import dictionary_of_tokens

from conceptx import Concept, Edit, methods
from conceptx.capabilities import capabilities
from conceptx.eraser import labelled_states

pytestmark = pytest.mark.filterwarnings("ignore:The personas do not tell")  # a random model follows no persona

CONCEPT = Concept("metals", texts=METALS, retain_texts=GARDEN, anchor="bread", retain=("bird", "cat"))
# What makes a method quick on a tiny model; everything else as published.
QUICK = {
    "EAR": {"layers": (0, 2), "window": 32, "threshold": 0.0, "learning_rate": 1e-3},
    "ELM": {
        "layers": (0, 3), "steps": 40, "batch_size": 6, "learning_rate": 3e-3, "eta": 20.0, "dropout": 0.0,
        "fluency_weight": 0.0, "max_tokens": 24,
    },
    "ESD": {"steps": 12, "batch_size": 2, "sampling_steps": 3, "learning_rate": 5e-3, "trajectory": "frozen"},
    "INLP": {"rounds": 4},
    "ItD": {"site": "text_encoder.layers.0", "margin": 0.005},
    "MACE": {
        "templates": ("{}", "the {}", "{} and bread"), "ridge": 0.1, "fuse_names": 50.0, "images": 2,
        "sampling_steps": 2, "steps": 4, "learning_rate": 1e-2,
    },
    "PISCES": {"strength": 4.0, "search_strength": 4.0, "max_harm": 5.0, "max_features": 2},
    "RMU": {
        "layer": 1, "trained": 2, "relative": True, "coefficient": 4.0, "retain_weight": 10.0, "steps": 30,
        "learning_rate": 1e-2, "max_tokens": 24,
    },
    "TRCE": {
        "steps": 4, "batch_size": 2, "keep_batch": 2, "sampling_steps": 4, "trajectories": 2, "unconditional": 4,
        "learning_rate": 1e-4,
    },
    "RealEra": {"near": 2, "far": 5, "steps": 4, "sampling_steps": 3, "learning_rate": 1e-3},
    "PCADirections": {"rank": 8},  # one component promises nothing
}  # fmt: skip
FEWER = {  # where the effect does not matter
    "ELM": {"steps": 1, "batch_size": 2},
    "ESD": {"steps": 2, "learning_rate": 1e-3, "trajectory": "edited"},
    "RMU": {"steps": 2},
    "TRCE": {"steps": 2},
}


def methods_on(host_name):
    return sorted(row.name for row in capabilities() if host_name in row.hosts)


TEXT, IMAGE, DRAWN, VECTOR = map(methods_on, ("LanguageModel", "DiffusionModel", "ARImageModel", "vectors"))
TWO, TWO_PIPELINES = ["llama", "gpt2"], ["sd1", "sdxl"]
# Where a published method has no meaning: (kind of model, method) -> what it says.
REFUSED = {
    ("sd3", "MACE"): "no cross-attention maps",
    ("flux", "MACE"): "no cross-attention maps",
    ("sd3", "SPEED"): "SPEED edits keys or values of cross-attention; here only .*context_embedder reads the text",
    ("flux", "SPEED"): "SPEED edits keys or values of cross-attention; here only .*context_embedder reads the text",
    ("sd3", "TRCE"): "trains attn1 and attn2.to_q of a U-Net, SD3Transformer2DModel has none",
    ("flux", "TRCE"): "maps the end-of-text row of CLIP, this denoiser reads the rows of a T5EncoderModel",
}
on_two = pytest.mark.parametrize("kind", TWO)


def pairs(kinds, pipelines):
    """Every method on these kinds of the models that it accepts."""
    accepted = ((TEXT, kinds), (IMAGE, pipelines), (DRAWN, [JANUS]))
    every = [(k, n) for names, on in accepted for n in names for k in on]
    every = [pair for pair in every if pair not in REFUSED]
    return pytest.mark.parametrize("kind,name", every)


every_on_all, every_on_two = pairs(ALL, PIPELINES), pairs(TWO, TWO_PIPELINES)


def method(name, fewer=True):
    return getattr(methods, name)(**(QUICK.get(name, {}) | (FEWER.get(name, {}) if fewer else {})))


def erased(model, name, seed=0, fewer=True):
    """At one or two sites for the vector methods: the contract is about the way, not the number of sites."""
    where = {"sites": model.default_sites[4:6] or model.default_sites[:1]} if name in VECTOR else {}
    if name == "ItD":
        texts = [CONCEPT.name, *CONCEPT.retain, *GARDEN]
        where = {"dictionary": dictionary_of_tokens(model, QUICK["ItD"]["site"], texts)}
    return method(name, fewer).erase(model, CONCEPT, seed=seed, **where)


@cache
def edit_for(name, kind, dtype=torch.float32, fewer=True):
    return erased(host(kind, dtype), name, fewer=fewer)


def tensors(edit):
    from conceptx.edit.files import _tensors

    return _tensors(edit)


def test_the_capability_table_names_every_method():
    assert [row.name for row in capabilities()] == methods.__all__
    assert {*TEXT, *IMAGE, *DRAWN, *VECTOR} == set(methods.__all__) and TEXT and IMAGE and DRAWN and VECTOR


@pytest.mark.parametrize("name", methods.__all__)
def test_1_constructs_without_arguments_and_settings_survive_json(name):
    eraser = getattr(methods, name)
    for settings in (eraser(), eraser(**QUICK.get(name, {}))):
        assert eraser.from_settings(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        eraser().anything = 1


@every_on_all
def test_2_3_4_the_host_stays_every_name_resolves_and_undo_is_exact(kind, name):
    model = host(kind)
    before, answer, random_state = state(model), said(model), torch.get_rng_state()
    edit = erased(model, name)
    assert same(before, state(model)) and torch.equal(answer, said(model)) and not model.applied
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(model.width(site) == m.dim for site, maps in edit.maps.items() for m in maps)
    assert all(delta.fits(model.parameter_shape(parameter)) for parameter, delta in edit.deltas.items())
    with edit.applied(model):
        assert (said(model) - answer).abs().max() > 1e-3
    assert same(before, state(model)) and torch.equal(answer, said(model))


@every_on_two
def test_5_saved_and_loaded_says_the_same(kind, name, tmp_path):
    model, edit = host(kind), edit_for(name, kind)
    edit.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = Edit.load(tmp_path)
    with edit.applied(model):
        wanted = said(model)
    with loaded.applied(model):
        assert torch.equal(said(model), wanted)
    (record,) = loaded.provenance
    assert (record["method"], record["concept"], record["seed"]) == (name, "metals", 0)
    assert type(method(name)).from_settings(record["settings"]) == method(name)


@every_on_two
def test_6_the_same_seed_gives_the_same_edit(kind, name):
    torch.manual_seed(99)
    assert same(tensors(erased(host(kind), name)), tensors(edit_for(name, kind)))


def separation(states, labels):
    """The distance of the two class means in units of the spread along it (Fisher's criterion)."""
    metals, garden = states[labels == 1], states[labels == 0]
    between = metals.mean(0) - garden.mean(0)
    along = [group @ (between / between.norm()) for group in (metals, garden)]
    return float(between.norm() / torch.stack([a.std() for a in along]).mean())


@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.parametrize("kind", [*TWO, "sd1", JANUS])
def test_7_the_two_kinds_of_text_come_closer(kind, name):
    model, site = host(kind), "text_encoder.layers.0" if kind == "sd1" else "layers.2.mlp_input"
    texts, labels = [*GARDEN, *METALS], [0] * len(GARDEN) + [1] * len(METALS)
    before = separation(*labelled_states(model, texts, labels, site))
    with edit_for(name, kind).applied(model):
        after = separation(*labelled_states(model, texts, labels, site))
    assert after < 0.8 * before


# How much more the concept's texts move than the retained ones, on random weights. PISCES stays within max_harm only.
MOVES = {"DirectionalAblation": 1.0, "ELM": 1.5, "PISCES": 1.0, "RMU": 1.5}


@pytest.mark.parametrize("name", sorted({*TEXT} - {*VECTOR}))
@on_two
def test_7_the_concepts_texts_move_more_than_the_retained(kind, name):
    model = tiny(kind)

    def moved(texts):
        rows = model.encode(texts)
        with torch.no_grad():
            before, after = model.predict(rows), None
            with edit_for(name, kind, fewer=False).applied(model):
                after = model.predict(rows)
        divergence = (before.exp() * (before - after)).sum(-1)  # nats at each position
        return torch.cat([d[-len(row) :] for d, row in zip(divergence, rows, strict=True)]).mean()

    assert moved(METALS) > MOVES[name] * moved(GARDEN)


# Of the texts that an image method leaves alone, one; and how much less it moves: squares, on random weights. UCE holds
# the retained names. ESD retains nothing, but without a prompt there is nothing that it was asked to turn away from.
KEPT = {
    "Budgeted": (lambda model: model.encode(CONCEPT.retain[:1]), 1.2),  # limits two of its 24 rows
    "UCE": (lambda model: model.encode(CONCEPT.retain[:1]), 10),
    "ESD": (lambda model: model.unconditional(), 1.2),
    "ItD": (lambda model: model.encode(CONCEPT.retain[:1]), 1e6),  # which is not changed at all
    "RECE": (lambda model: model.encode(CONCEPT.retain[:1]), 10),
    "RealEra": (lambda model: model.encode(CONCEPT.retain[:1]), 2),
    "SPEED": (lambda model: model.encode(CONCEPT.retain[:1]), 10),
    "TRCE": (lambda model: model.encode(CONCEPT.retain[:1]), 5),
    "MACE": (lambda model: model.encode(CONCEPT.retain[:1]), 4),
}


@pytest.mark.parametrize("name", sorted({*IMAGE} - {*VECTOR}))
@pytest.mark.parametrize("kind", TWO_PIPELINES)
@torch.no_grad()
def test_7_the_target_moves_more_than_the_retained(kind, name):
    model, latents = tiny_pipeline(kind), tiny_pipeline(kind).noise(range(6))
    retained, factor = KEPT[name]

    def moved(encoded, timestep=600):
        before = model.predict(latents, timestep, encoded(model))
        with edit_for(name, kind, fewer=False).applied(model):
            return (model.predict(latents, timestep, encoded(model)) - before).square().mean()

    assert moved(lambda model: model.encode([CONCEPT.name])) > factor * moved(retained)


# On random weights, squares of scores. UCE holds the retained names; EAR retains nothing, but turns its own prompts.
@pytest.mark.parametrize("name,factor", [("EAR", 1.1), ("UCE", 10)])
def test_7_the_target_moves_more_than_the_retained_token_by_token(name, factor):
    model = tiny_janus()

    def moved(prompt):
        before = scores(model, [prompt])
        with edit_for(name, JANUS, fewer=False).applied(model):
            return (scores(model, [prompt]) - before).square().mean()

    assert moved(CONCEPT.name) > factor * moved(CONCEPT.retain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_on_two
def test_8_no_nan_in_either_precision(kind, dtype, name):
    model = host(kind, dtype)
    edit, plain = edit_for(name, kind, dtype), said(model)
    assert all(bool(t.isfinite().all()) for t in tensors(edit).values())
    with edit.applied(model):
        assert bool(said(model).isfinite().all()) and said(model).dtype == plain.dtype
        assert not torch.equal(said(model), plain)


@pytest.mark.parametrize("row", capabilities(), ids=lambda row: row.name)
def test_9_the_docstring_names_its_paper_and_every_setting(row):
    eraser = getattr(methods, row.name)
    text = inspect.getmodule(eraser).__doc__ + eraser.__doc__
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert re.search(r"(Eq|eqs?\.|Theorem|Algorithm|§)", text)
    assert all(re.search(rf"\b{f.name}\b", eraser.__doc__) for f in dataclasses.fields(eraser))
    assert row.source.endswith((".", "…")) and len(row.source) < 160


# Concepts from which a method cannot learn: host -> (concept, what the error says).
WRONG = {
    "LanguageModel": [
        (concept, "Concept 'metals' needs|needs the concept's")
        for concept in (Concept("metals"), Concept("metals", texts=METALS), Concept("metals", retain_texts=GARDEN))
    ],
    "DiffusionModel": [([], "No concept was given"), (Concept("gold " * 40), "has 42 tokens .* keeps 24")],
    "ARImageModel": [
        ([], "No concept was given"),
        (Concept("gold " * 99, anchor="tin"), r"has \d+ tokens, .* reads 128"),
    ],
}


@contextmanager
def refused(match):
    """A ValueError of one sentence."""
    with pytest.raises(ValueError, match=match) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("kind,name", REFUSED)
def test_10_where_a_method_has_no_meaning_it_says_so(kind, name):
    model = host(kind)
    before = state(model)
    with refused(REFUSED[kind, name]):
        erased(model, name)
    assert same(before, state(model)) and not model.applied


@every_on_two
def test_10_a_wrong_input_is_one_clear_error_before_anything_changes(kind, name):
    model, other = host(kind), host(kind, seed=1)
    before = state(model)
    for concept, message in WRONG["LanguageModel" if name in VECTOR else type(model).__name__]:
        with refused(message):
            method(name).erase(model, concept)
    with refused("made for another model"):
        edit_for(name, kind).apply(other)
    with refused(f"{name} has no setting nothing; it has"):
        type(method(name)).from_settings({"nothing": 1})
    assert same(before, state(model)) and not model.applied and same(state(other), state(host(kind, seed=1)))
