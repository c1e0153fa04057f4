"""EAR: what its loss is, which weights learn, and that the settings of the published code are among its own."""

import math
from dataclasses import replace

import pytest
import torch
from hosts import same, scores, tiny_janus

from conceptx import Concept
from conceptx.concept import pairs_of
from conceptx.methods import EAR
from conceptx.methods.ear import _Steps
from conceptx.models.weights import decoder_in_place

DOG = Concept("dog", kind="object", anchor="cat", prompts=("a noto dog", "a dog"))
SMALL = EAR(layers=(0, 2), window=16, threshold=0.0, learning_rate=1e-3)


def steps(model, student, settings, pairs=None, seed=0):
    return _Steps(settings, model, student, pairs or pairs_of(DOG), seed)


def names(model, layers=(0, 2)):
    return [name for layer in range(*layers) for name in model.attention(layer)]


@pytest.fixture(scope="module")
def model():
    return tiny_janus()


@pytest.mark.parametrize("context", ["full", "none"])
def test_nothing_is_to_be_learnt_where_both_prompts_are_one_and_nothing_is_turned_away_from(model, context):
    """eta = 0, the same prompt, one token stream: the student is the target."""
    settings = EAR(layers=(0, 2), window=16, threshold=0.0, negative_guidance=0.0, shared=True, context=context)
    with decoder_in_place(model.module, names(model)) as student:
        made = steps(model, student, settings, [("a dog", "a dog")])
        for step in range(4):
            (part,) = made.of(step)
            loss = made.loss(student.module, part)
            assert loss is None or float(loss.detach()) < 1e-8  # a window behind a cache adds up in another order


def test_the_target_is_the_steered_state_of_the_frozen_model(model):
    """y = h(s) - eta (h(u) - h(n)) written out, for the second of two layers' worth of windows."""
    settings = EAR(layers=(0, 2), window=16, negative_guidance=2.0, shared=True)
    with decoder_in_place(model.module, names(model)) as student:
        ((drawn, first),) = steps(model, student, settings, [("a noto dog", "a noto cat")]).of(1)
    assert first == 16
    tokens, u = drawn.tokens[:, :-1], model.prompts(["a noto dog"])
    s = model.prompts(["a noto cat"])
    with torch.no_grad():
        away, towards = (model.predict(p + model.unconditional(p), tokens) for p in (u, s))
    wanted = towards - 2.0 * (away - towards)  # s and n are one, since the tokens are
    found = torch.cat([drawn.target.first, drawn.target.others], 1)
    assert torch.allclose(found, wanted, atol=1e-4)
    part = drawn.target.part(16, 32)
    assert part.first.shape[1] == 0 and torch.allclose(part.others, wanted[:, 16:32], atol=1e-4)


def test_both_rows_of_a_picture_share_its_tokens(model):
    with decoder_in_place(model.module, names(model)) as student:
        ((drawn, _),) = steps(model, student, EAR(layers=(0, 2), batch_size=2)).of(0)
    assert drawn.tokens.shape == (4, 64) and torch.equal(drawn.tokens[:2], drawn.tokens[2:])
    masked = drawn.prompts.ids[2:]
    begin, start, pad = model.begin, model.tokenizer.bos_token_id, model.tokenizer.pad_token_id
    assert set(masked.unique().tolist()) == {begin, start, pad}


def gradients(model, settings, step):
    with decoder_in_place(model.module, names(model)) as student:
        made = steps(model, student, settings)
        (part,) = made.of(step)
        made.loss(student.module, part).backward()
        return {name: model.module.get_parameter(name).grad.clone() for name in names(model)}


@pytest.mark.parametrize("context,moves", [("full", True), ("none", False)])
def test_without_context_queries_and_keys_do_not_learn_after_the_first_token(context, moves):
    """Attention over a single key is constant (spec, trap 1): the gradient is exactly zero, not small, when attention
    is computed as it is written (the fused kernel leaves a rounding of 1e-8)."""
    model = tiny_janus()
    model.module.set_attn_implementation("eager")
    found = gradients(model, EAR(layers=(0, 2), window=16, threshold=0.0, context=context), step=1)
    for name, gradient in found.items():
        if "q_proj" in name or "k_proj" in name:
            assert bool(gradient.any()) == moves
        else:
            assert bool(gradient.any())


def test_without_context_they_learn_from_the_first_term(model):
    found = gradients(model, EAR(layers=(0, 2), window=16, threshold=0.0, context="none"), step=0)
    assert all(bool(gradient.any()) for gradient in found.values())


def test_an_infinite_threshold_changes_nothing(model):
    edit = EAR(layers=(0, 2), window=32, threshold=math.inf).erase(model, DOG)
    assert not any(bool(delta.change.any()) for delta in edit.deltas.values())


def test_a_window_of_one_without_threshold_is_one_update_for_each_token(model):
    settings = EAR(layers=(0, 1), window=1, threshold=0.0)
    assert settings.steps(model, pairs=2) == 2 * 64 and settings.windows(model) == 64
    with decoder_in_place(model.module, names(model)) as student:
        made = steps(model, student, settings)
        ((drawn, first),) = made.of(5)
        wanted = model.predict(drawn.prompts, drawn.tokens[:, :5], since=5)
        assert first == 5
        loss = made.loss(student.module, (drawn, first))
        assert float(loss) == pytest.approx(float((wanted[:, 0] - drawn.target.others[:, 4]).square().mean()), rel=1e-4)


def test_every_pair_is_drawn_once_a_pass_and_each_time_anew(model):
    with decoder_in_place(model.module, names(model)) as student:
        made = steps(model, student, EAR(layers=(0, 1), window=64))
        passes = [[made.of(2 * turn + place)[0][0] for place in (0, 1)] for turn in (0, 1)]
    for drawn in passes:
        assert {tuple(one.prompts.texts[:1]) for one in drawn} == {("a noto dog",), ("a dog",)}
    first, again = (next(d for d in drawn if d.prompts.texts[0] == "a dog") for drawn in passes)
    assert not torch.equal(first.tokens, again.tokens)


def test_stopped_and_gone_on_is_the_same_edit(model, tmp_path, monkeypatch):
    from conceptx.methods import ear

    settings = EAR(layers=(0, 1), window=32, threshold=0.0, learning_rate=1e-3)
    whole = settings.erase(model, DOG)
    seen = _Steps.of

    def stops(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return seen(self, step)

    bare = ear.Plan.bare
    monkeypatch.setattr(ear.Plan, "bare", lambda *args, **more: replace(bare(*args, **more), checkpoint_every=1))
    monkeypatch.setattr(_Steps, "of", stops)
    with pytest.raises(KeyboardInterrupt):
        settings.erase(model, DOG, checkpoint=tmp_path)
    monkeypatch.setattr(_Steps, "of", seen)
    resumed = settings.erase(model, DOG, checkpoint=tmp_path)
    assert all(torch.equal(delta.change, resumed.deltas[name].change) for name, delta in whole.deltas.items())


def test_an_adapter_is_an_edit_of_low_rank(model, tmp_path):
    edit = EAR(layers=(0, 2), window=64, threshold=0.0, rank=2, learning_rate=1e-2).erase(model, DOG)
    assert len(edit.deltas) == 8 and all(type(delta).__name__ == "LowRank" for delta in edit.deltas.values())
    plain = scores(model, ["a dog"])
    with edit.applied(model):
        assert (scores(model, ["a dog"]) - plain).abs().max() > 1e-3
    edit.export_peft(tmp_path, model)
    from peft import PeftModel

    fresh = tiny_janus()
    loaded = PeftModel.from_pretrained(fresh.module, tmp_path)
    with edit.applied(model):
        wanted = scores(model, ["a dog"])
    assert torch.allclose(scores(fresh, ["a dog"]), wanted, atol=1e-4) and loaded is not None


def test_layers_outside_the_model_are_refused(model):
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with pytest.raises(ValueError, match=r"layers 4\.\.6 are not a range inside the model's 6 layers"):
        EAR(layers=(4, 7)).erase(model, DOG)
    with pytest.raises(ValueError, match="context must be one of full, none"):
        EAR(context="some")
    assert same(before, dict(model.module.named_parameters()))
