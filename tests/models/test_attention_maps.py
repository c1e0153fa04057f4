"""What a U-Net looks at: the captured probabilities are those by which it computes, and capturing changes nothing."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from hosts import tiny_pipeline

from conceptx.models.attention_maps import captured, cross_attentions

KINDS = ("sd1", "sd2", "sdxl")


def given(model, count=2):
    return model.noise(range(count)), torch.tensor([100.0, 600.0])[:count], model.encode(["cat", "hot iron"][:count])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probabilities_sum_to_one_and_the_prediction_is_the_same_bit_for_bit(kind):
    model = tiny_pipeline(kind)
    plain = model.predict(*given(model))
    processors = {id(p) for p in model.denoiser.attn_processors.values()}
    with captured(model) as maps:
        watched = model.predict(*given(model))
    assert torch.equal(watched, plain) and {*maps} == {*cross_attentions(model)} and len(maps) >= 2
    assert {f"{path}.to_{x}" for path in maps for x in "kv"} == set(model.projections)
    for path, found in maps.items():
        heads = model.module.get_submodule(path).heads
        assert found.shape[:2] == (2, heads) and found.shape[3] == model.encode(["cat"]).states.shape[1]
        assert float(found.min()) >= 0
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))  # float32 sums of 24 numbers
    assert processors == {id(p) for p in model.denoiser.attn_processors.values()}


@torch.no_grad()
def test_they_are_what_the_layer_mixes_its_values_by():
    """Whatever does the arithmetic: probabilities times values, through the output layer, is what the layer gave."""
    model = tiny_pipeline()
    path = cross_attentions(model)[0]
    layer, seen = model.module.get_submodule(path), {}
    hook = layer.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, out=out), with_kwargs=True)
    for processor in (AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)):
        model.denoiser.set_attn_processor(processor)
        with captured(model) as maps:
            model.predict(*given(model))
        values = layer.to_v(seen["encoder_hidden_states"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        mixed = (maps[path] @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(layer.to_out[0](mixed), seen["out"], rtol=1e-4, atol=1e-5)  # float32, other order
        assert type(layer.processor) is type(processor)
    hook.remove()


def test_gradients_go_through_and_nothing_is_left_behind_after_an_error():
    model = tiny_pipeline()
    latents, times, prompts = given(model)
    layers = [model.module.get_submodule(path) for path in cross_attentions(model)]
    with captured(model) as maps, torch.no_grad():
        model.predict(latents, times, prompts)
    first, last = (model.module.get_submodule([*maps][place]) for place in (0, -1))  # in the order of computing
    with pytest.raises(InterruptedError), captured(model) as maps:
        model.predict(latents, times, prompts)
        sum(found[..., 1].sum() for found in maps.values()).backward()
        raise InterruptedError
    assert not any(layer._forward_pre_hooks for layer in layers)
    # the last layer's own keys and queries, and through the layers before it also their values
    assert all(bool(part.weight.grad.any()) for part in (last.to_k, last.to_q, first.to_v))
    assert last.to_v.weight.grad is None


@torch.no_grad()
def test_tokens_that_the_caller_masks_are_not_looked_at():
    model = tiny_pipeline()
    latents, times, prompts = given(model)
    mask = torch.ones(2, prompts.states.shape[1])
    mask[0, 5:] = 0
    with captured(model) as maps:
        model.denoiser(latents, times, prompts.states, encoder_attention_mask=mask)
    for found in maps.values():
        assert float(found[0, ..., 5:].max()) == 0 and float(found[1, ..., 5:].max()) > 0


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_joint_attention_is_refused(kind):
    with pytest.raises(ValueError, match="no cross-attention maps"), captured(tiny_pipeline(kind)):
        pass
