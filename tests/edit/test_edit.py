"""Apply and undo, strength, stacking, and recognising the model an edit was made for."""

import warnings

import pytest
import torch
from hosts import logits, noise, same, state, tiny, tiny_pipeline

from conceptx import wrap
from conceptx.edit import Dense, Edit, LowRank, Rows
from conceptx.geometry import ConceptMap, Subspace

Q, BIAS, EMBEDDING = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.embed_tokens.weight",
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def removal(seed, d=32, rank=2):
    return Subspace.orthogonal(normal(d, rank, seed=seed), normal(d, seed=seed + 100)).removal()


def everything(model):
    """An edit with every kind of change, among them a bias that the model has not."""
    return Edit(
        model.fingerprint,
        maps={"layers.1.mlp_input": (removal(0), removal(1)), "layers.2.output": (removal(2),)},
        deltas={
            Q: LowRank(normal(32, 2), normal(2, 32)),
            BIAS: Dense(normal(32)),
            EMBEDDING: Rows(torch.tensor([7, 40]), normal(2, 32)),
            "model.norm.weight": Dense(normal(32)),
        },
        generation={"repetition_penalty": 1.5},
        provenance=({"method": "test", "concept": "nothing"},),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_undo_restores_bit_for_bit(kind, dtype):
    model = tiny(kind, dtype)
    before, said = state(model), logits(model)
    handle = everything(model).apply(model)
    assert handle.in_force and not same(before, state(model))
    assert not torch.equal(said, logits(model))
    handle.undo()
    handle.undo()  # a second call does nothing
    assert same(before, state(model)) and torch.equal(said, logits(model)) and not model.applied


def test_subtracting_instead_of_restoring_would_not_pass():
    """The reason for restoring: (w + d) - d differs from w, so the test above can fail."""
    model = tiny()
    weight, delta = model.parameter(Q).clone(), everything(model).deltas[Q]
    assert not torch.equal((delta * -1.0).added_to(delta.added_to(weight)), weight)


def test_undone_after_an_exception_inside_with():
    model = tiny()
    before = state(model)
    with pytest.raises(ZeroDivisionError), everything(model).applied(model):
        raise ZeroDivisionError
    assert same(before, state(model)) and not model.applied


@pytest.mark.parametrize("stop", ["install", "add_bias"])
def test_failure_half_way_through_apply_puts_everything_back(stop, monkeypatch):
    model = tiny()
    before, said = state(model), logits(model)

    def broken(*_):
        assert not same(before, state(model))  # something has been changed by now
        raise MemoryError

    monkeypatch.setattr(model, stop, broken)
    with pytest.raises(MemoryError):
        everything(model).apply(model)
    assert same(before, state(model)) and torch.equal(said, logits(model)) and not model.applied


def test_undo_out_of_order_is_refused():
    model = tiny()
    before = state(model)
    first, second = everything(model).apply(model), everything(model).apply(model)
    with pytest.raises(ValueError, match="later edit is in force"):
        first.undo()
    second.undo()
    first.undo()
    assert same(before, state(model))


def test_strength_zero_changes_nothing_and_one_is_the_edit():
    model = tiny()
    edit, said = everything(model), logits(model)
    with edit.applied(model):
        whole = logits(model)
    with (edit * 1.0).applied(model):
        assert torch.equal(logits(model), whole)
    with (0.0 * edit).applied(model):
        assert torch.equal(logits(model), said)


def test_strength_half_is_half_of_every_change():
    model = tiny()
    half = everything(model) * 0.5
    before = model.parameter(Q).clone()
    with half.applied(model):
        moved = model.parameter(Q) - before
    with everything(model).applied(model):
        # float32 sums: the difference is exact to one rounding of weights of size 1
        torch.testing.assert_close(moved * 2, model.parameter(Q) - before, rtol=0, atol=1e-6)
    x = normal(3, 32)
    whole = removal(2)
    torch.testing.assert_close(half.maps["layers.2.output"][0](x), (x + whole(x)) / 2, rtol=0, atol=1e-12)  # float64
    assert half.provenance[0]["strength"] == 0.5


def test_stacked_weight_changes_are_sums_without_an_order():
    model = tiny()
    one = Edit(model.fingerprint, deltas={Q: LowRank(normal(32, 1), normal(1, 32)), BIAS: Dense(normal(32))})
    two = Edit(model.fingerprint, deltas={Q: Rows(torch.tensor([3]), normal(1, 32, seed=5)), BIAS: Dense(normal(32))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both, other_way = one + two, two + one
    with both.applied(model):
        together = state(model)
    with one.applied(model), two.applied(model):
        one_by_one = state(model)
    with other_way.applied(model):
        backwards = state(model)
    for name, tensor in together.items():
        # one rounding to float32 against two, of weights of size 1 to 4
        torch.testing.assert_close(tensor, one_by_one[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(tensor, backwards[name], rtol=0, atol=1e-6)


def test_stacked_maps_act_one_after_the_other():
    model, site = tiny(), "layers.1.mlp_input"
    one, two = (Edit(model.fingerprint, maps={site: (removal(seed),)}) for seed in (0, 1))
    with pytest.warns(UserWarning, match="order of the stacked edits matters at site layers.1.mlp_input"):
        both = one + two
    with both.applied(model):
        together = logits(model)
    with one.applied(model), two.applied(model):
        assert torch.equal(together, logits(model))


def test_no_warning_where_the_order_is_free():
    model, site = tiny(), "layers.1.mlp_input"
    basis = torch.linalg.qr(normal(32, 4)).Q
    one, two = (
        Edit(model.fingerprint, maps={site: (Subspace.orthogonal(part).removal(),)})
        for part in (basis[:, :2], basis[:, 2:])
    )
    elsewhere = Edit(model.fingerprint, maps={"layers.0.output": (removal(7),)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both, backwards = one + two + elsewhere, elsewhere + two + one
    with both.applied(model):
        together = logits(model)
    with backwards.applied(model):
        # maps compute in float64 and round to float32 in between: a few roundings of logits of size 5
        torch.testing.assert_close(logits(model), together, rtol=0, atol=1e-4)


def test_stacking_edits_of_different_models_or_clashing_generation_is_refused():
    edit = everything(tiny())
    with pytest.raises(ValueError, match="different models cannot be stacked: its architecture"):
        edit + Edit(tiny("gpt2").fingerprint)
    with pytest.raises(ValueError, match="different generation arguments"):
        edit + Edit(edit.host, generation={"repetition_penalty": 2.0})
    assert (edit + Edit(edit.host, generation={"top_k": 3})).generation == {"repetition_penalty": 1.5, "top_k": 3}


def test_a_gated_map_acts_on_positive_coordinates_only():
    model, site = tiny(), "layers.0.output"
    read = normal(1, 32)
    gated = ConceptMap(normal(32, 1, seed=1), read, torch.zeros(32, dtype=torch.float64), "relu")
    (before,) = model.record(["iron and gold"], [site])
    with Edit(model.fingerprint, maps={site: (gated,)}).applied(model):
        (after,) = model.record(["iron and gold"], [site])
    silent = before[site].double() @ read[0] <= 0
    assert 0 < int(silent.sum()) < len(silent)
    assert torch.equal(before[site][silent], after[site][silent])
    assert bool((before[site][~silent] != after[site][~silent]).any(1).all())


@pytest.mark.parametrize("made,used", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_the_same_model_in_another_dtype_is_accepted(made, used):
    edit = everything(tiny(dtype=getattr(torch, made)))
    with edit.applied(tiny(dtype=getattr(torch, used))):
        pass


def one_matrix_changed():
    model = tiny()
    with torch.no_grad():
        model.module.model.layers[2].mlp.up_proj.weight.mul_(1.05)
    return model


@pytest.mark.parametrize(
    "other,reason",
    [
        (lambda: tiny(seed=1), "sampled weights differ"),
        (one_matrix_changed, "16 of .* sampled weights differ"),
        (lambda: tiny("gpt2"), "architecture or parameter shapes differ"),
        (lambda: tiny("mistral"), "architecture or parameter shapes differ"),  # same shapes as llama, other kind
        (lambda: tiny("llama_tied"), "architecture or parameter shapes differ"),
    ],
)
def test_another_model_is_refused_and_left_alone(other, reason):
    model = other()
    before = state(model)
    with pytest.raises(ValueError, match=f"made for another model: .*{reason}"):
        everything(tiny()).apply(model)
    assert same(before, state(model)) and not model.applied


def test_a_change_of_a_tied_weight_acts_on_both_ends_once():
    model = tiny("llama_tied")
    before = model.parameter(EMBEDDING).clone()
    with Edit(model.fingerprint, deltas={"lm_head.weight": Dense(torch.ones(320, 32))}).applied(model):
        assert torch.equal(model.parameter(EMBEDDING), before + 1)
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_no_warning_for_maps_that_commute_though_they_meet():
    """Projections onto nested spaces, or the same one twice, commute."""
    model, site = tiny(), "layers.1.mlp_input"
    basis = torch.linalg.qr(normal(32, 4)).Q
    one, two = (
        Edit(model.fingerprint, maps={site: (Subspace.orthogonal(part).removal(),)}) for part in (basis, basis[:, 2:])
    )
    x = normal(5, 32)
    first, second = one.maps[site][0], two.maps[site][0]
    torch.testing.assert_close(first(second(x)), second(first(x)), rtol=0, atol=1e-12)  # float64 rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one + two
        one + one


# -- edits of the text alone -------------------------------------------------------------------------------------------


def another_denoiser():
    """The same text encoder before a U-Net of other weights."""
    pipeline = tiny_pipeline("sd1").pipeline
    pipeline.register_modules(unet=tiny_pipeline("sd1", seed=1).denoiser)
    return wrap(pipeline)


def test_an_edit_of_the_text_applies_to_every_pipeline_with_these_text_encoders():
    first, second, prompts = tiny_pipeline("sd1"), another_denoiser(), ["gold and iron"]
    edit = Edit(first.text_fingerprint, maps={"text": (removal(0),)})
    for model in (first, second):
        before = noise(model, prompts)
        with edit.applied(model):
            assert (noise(model, prompts) - before).abs().max() > 1e-3
        assert torch.equal(noise(model, prompts), before)
    with pytest.raises(ValueError, match="another model: text_encoder: 224 of 576 sampled weights differ"):
        edit.apply(tiny_pipeline("sd1", seed=1))
    with pytest.raises(ValueError, match="another model: it has no text_encoder"):
        edit.apply(tiny())


def test_weights_folded_for_one_denoiser_do_not_apply_to_another():
    first, second = tiny_pipeline("sd1"), another_denoiser()
    folded = Edit(first.text_fingerprint, maps={"text": (Subspace.orthogonal(normal(32, 2)).removal(),)}).fold(first)
    assert folded.host.mismatch(first.fingerprint) is None and not folded.maps
    with pytest.raises(ValueError, match=r"another model: unet: \d+ of \d+ sampled weights differ"):
        folded.apply(second)


def test_stacked_edits_need_the_parts_of_both():
    first, second = tiny_pipeline("sd1"), another_denoiser()
    text = Edit(first.text_fingerprint, maps={"text": (removal(0),)})
    both = text + Edit(first.fingerprint, deltas={"unet.conv_in.bias": Dense(torch.ones(16))})
    assert both.host.mismatch(first.fingerprint) is None
    with pytest.raises(ValueError, match="another model: unet"):
        both.apply(second)
    with pytest.raises(ValueError, match="cannot be stacked: they have no component in common"):
        text + Edit(tiny().fingerprint)
    with pytest.raises(ValueError, match="cannot be stacked: text_encoder"):
        text + Edit(tiny_pipeline("sd1", seed=1).text_fingerprint)
