"""W' x + b' = W T(x) + b: folded weights do what the maps in front of them did, in every family."""

import pytest
import torch
from hosts import ALL, logits, same, state, tiny

from conceptx.edit import Dense, Edit, LowRank
from conceptx.geometry import ConceptMap, Subspace

# Models in float64. A linear layer then differs by the order of sums of about 50 products of unit size.
EXACT = {"rtol": 0, "atol": 1e-12}
# Through three blocks that amplify, and through the RMS norms that compute in float32 in any model: 1e-6 is seen on
# logits of size 5.
THROUGH_THE_MODEL = {"rtol": 0, "atol": 1e-4}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def removal(d, seed=0):
    return Subspace.orthogonal(normal(d, 2, seed=seed), normal(d, seed=seed + 100)).removal()


def foldable(model):
    return [site for site in model.sites if model.readers(site)]


def assert_folds_exactly(model, edit):
    before, said = state(model), logits(model)
    folded = edit.fold(model)
    assert same(before, state(model))  # folding changes no model
    with edit.applied(model):
        wanted = logits(model)
    with folded.applied(model):
        torch.testing.assert_close(logits(model), wanted, **THROUGH_THE_MODEL)
    assert (wanted - said).abs().max() > 0.1  # it did something
    assert same(before, state(model))
    return folded


def assert_layers_absorb(model, site, concept_map, folded):
    x = normal(5, model.width(site), seed=9)
    for reader in model.readers(site):
        weight, bias = model.parameter(f"{reader}.weight"), model.parameter(f"{reader}.bias")
        wanted = concept_map(x) @ weight.T + (0 if bias is None else bias)
        with folded.applied(model):
            got = x @ model.parameter(f"{reader}.weight").T + model.parameter(f"{reader}.bias")
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("kind", ALL)
def test_every_foldable_site_of_every_family(kind):
    model = tiny(kind, torch.float64)
    assert len(foldable(model)) == 4 * model.depth
    for site in foldable(model)[:4]:  # a layer at a time is enough: the layers are alike
        folded = assert_folds_exactly(model, Edit(model.fingerprint, maps={site: (removal(model.width(site)),)}))
        assert not folded.maps
        weights = {name for name in folded.deltas if name.endswith(".weight")}
        assert weights == {f"{reader}.weight" for reader in model.readers(site)}
        assert_layers_absorb(model, site, removal(model.width(site)), folded)
    maps = {site: (removal(model.width(site), seed),) for seed, site in enumerate(foldable(model))}
    assert_folds_exactly(model, Edit(model.fingerprint, maps=maps))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stacked_maps_at_one_site(kind):
    model = tiny(kind, torch.float64)
    stack = tuple(removal(32, seed) for seed in range(3))
    assert_folds_exactly(model, Edit(model.fingerprint, maps={"layers.1.mlp_input": stack}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_map_in_front_of_a_changed_weight(kind):
    """The map is absorbed by the weight as the same edit changes it: (W + D) T(x)."""
    model, site = tiny(kind, torch.float64), "layers.1.attention_input"
    reader = f"{model.readers(site)[0]}.weight"
    out = model.parameter_shape(reader)[0]
    for delta in (Dense(normal(out, 32)), LowRank(normal(out, 3), normal(3, 32))):
        edit = Edit(model.fingerprint, maps={site: (removal(32),)}, deltas={reader: delta})
        assert_folds_exactly(model, edit)


def test_a_map_in_front_of_a_layer_whose_bias_the_edit_adds():
    model, site = tiny("llama", torch.float64), "layers.1.mlp_hidden"
    bias = f"{model.readers(site)[0]}.bias"
    assert_folds_exactly(model, Edit(model.fingerprint, maps={site: (removal(48),)}, deltas={bias: Dense(normal(32))}))


def test_a_map_without_a_mean_adds_no_bias():
    model, site = tiny("llama", torch.float64), "layers.1.attention_input"
    through_origin = Subspace.orthogonal(normal(32, 2)).removal()
    folded = assert_folds_exactly(model, Edit(model.fingerprint, maps={site: (through_origin,)}))
    assert {delta.kind for delta in folded.deltas.values()} == {"low_rank"}


def test_what_cannot_be_folded_stays_a_map():
    model = tiny("llama", torch.float64)
    gated = ConceptMap(normal(32, 1), normal(1, 32, seed=1), normal(32, seed=2), "relu")
    maps = {
        "layers.0.mlp_input": (removal(32), gated),  # one gate keeps the whole site
        "layers.1.output": (removal(32),),  # the residual stream has no reader of its own
        "layers.2.mlp_input": (removal(32),),
    }
    folded = assert_folds_exactly(model, Edit(model.fingerprint, maps=maps))
    assert folded.maps == {site: maps[site] for site in ("layers.0.mlp_input", "layers.1.output")}
    assert folded.deltas and all(".2.mlp." in name for name in folded.deltas)
    with pytest.raises(ValueError, match="not affine"):
        gated.factors(normal(5, 32))


def test_float32_folds_to_rounding():
    model = tiny("llama")
    edit = Edit(model.fingerprint, maps={site: (removal(model.width(site)),) for site in foldable(model)})
    with edit.applied(model):
        wanted = logits(model)
    with edit.fold(model).applied(model):
        # a weight is rounded once, 6e-8 of its size; twelve layers deep that stays below 1e-4 of logits of size 5
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
