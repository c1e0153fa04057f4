"""A LoRA adapter visits the user's model and leaves it as it was."""

import pytest
import torch
from hosts import ALL, METALS, PIPELINES, logits, same, state, tiny, tiny_pipeline

from conceptx import Edit
from conceptx.models.adapters import Adapter, inserted, linear_modules, low_rank_deltas


def adapter_for(model, layers=(1, 2)):
    return Adapter(2, 6.0, 0.0, linear_modules(model, layers))


def everything_about(model):
    """Classes, modes, hooks, attributes and gradient flags: what `state` does not see."""
    modules = [
        (name, type(m), m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.module.named_modules()
    ]
    return modules, [(name, p.requires_grad, p.data_ptr()) for name, p in model.module.named_parameters()]


def set_at_random(student, scale=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ALL)
def test_only_the_linear_layers_of_the_chosen_blocks_get_an_adapter(kind):
    model = tiny(kind)
    blocks = model.block.layers
    expected = {
        name
        for name, module in model.module.named_modules()
        if name.startswith(f"{blocks}.1.") and type(module).__name__ in ("Linear", "Conv1D")
    }
    assert set(linear_modules(model, (1, 2))) == expected and len(linear_modules(model, (0, 2))) == 2 * len(expected)
    with inserted(model, adapter_for(model), 0) as student:
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained} == expected
        assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("crash", [False, True])
def test_on_exit_the_model_is_what_it_was(kind, crash):
    model = tiny(kind)
    model.module.train()
    model.module.get_submodule(f"{model.block.layers}.0").eval()
    first = next(model.module.parameters())
    first.requires_grad_(False)
    before, about = state(model), everything_about(model)
    try:
        with inserted(model, adapter_for(model), 0) as student:
            set_at_random(student)
            student.eval()
            if crash:
                raise InterruptedError
    except InterruptedError:
        pass
    assert same(before, state(model)) and everything_about(model) == about


@pytest.mark.parametrize("kind", ALL)
def test_the_deltas_do_what_the_adapter_does(kind):
    model = tiny(kind)
    adapter = adapter_for(model, (0, 2))
    said = logits(model)
    with inserted(model, adapter, 0) as student:
        assert torch.equal(logits(student), said)  # a fresh adapter changes nothing
        set_at_random(student)
        wanted = logits(student.eval())
        deltas = low_rank_deltas(student, adapter)
    assert (wanted - said).abs().max() > 0.1
    with Edit(model.fingerprint, deltas=deltas).applied(model):
        # W x + B (A x) against (W + B A) x in float32, on logits of size 5
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


def test_the_seed_starts_the_adapter_and_leaves_the_users_random_state():
    model = tiny()

    def start(seed):
        with inserted(model, adapter_for(model), seed) as student:
            return [p.detach().clone() for name, p in student.named_parameters() if "lora_A" in name]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, again, other = start(0), start(0), start(1)
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layers", [(0, 4), (2, 2), (2, 1), (-1, 2), (3, 4)])
def test_layers_outside_the_model_are_refused(layers):
    with pytest.raises(ValueError, match="not a range inside the model's 3 layers"):
        linear_modules(tiny(), layers)


# -- pipelines -----------------------------------------------------------------------------------------------------


def pipeline_adapter(model):
    """On the layers that read the text, one other of the denoiser, and one of a text encoder."""
    linear = [name.removesuffix(".weight") for name, _ in model.module.named_parameters() if model_takes(model, name)]
    other = next(path for path in linear if path.startswith(model.denoiser_name) and path not in model.projections)
    encoder = next(path for path in linear if path.startswith("text_encoder."))
    return Adapter(2, 6.0, 0.0, (*model.projections, other, encoder))


def model_takes(model, name):
    return name.endswith(".weight") and model.takes_adapter(name)


def noise(model):
    with torch.no_grad():
        return model.predict(model.noise([0, 1]), 500, model.encode([METALS[0][:20], "a cat"]), guidance=2.0)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("crash", [False, True])
def test_on_exit_a_pipeline_is_what_it_was(kind, crash):
    model = tiny_pipeline(kind)
    model.denoiser.train()
    next(model.module.parameters()).requires_grad_(False)
    said = noise(model)  # first, since a text encoder keeps hooks of its own from its first call on
    before, about = state(model), everything_about(model)
    try:
        with inserted(model, pipeline_adapter(model), 0) as student:
            assert torch.equal(noise(model), said)  # a fresh adapter changes nothing
            set_at_random(student)
            if crash:
                raise InterruptedError
    except InterruptedError:
        pass
    assert same(before, state(model)) and everything_about(model) == about and torch.equal(noise(model), said)


@pytest.mark.parametrize("kind", PIPELINES)
def test_inside_the_block_the_wrapped_pipeline_is_the_student_and_its_teacher(kind):
    model = tiny_pipeline(kind)
    adapter, said = pipeline_adapter(model), noise(model)
    with inserted(model, adapter, 0) as student:
        set_at_random(student)
        wanted = noise(model)
        with student.disable_adapter():
            assert torch.equal(noise(model), said)
        trained = {name.split(".lora_")[0] for name, p in student.named_parameters() if p.requires_grad}
        assert {name.removeprefix("base_model.model.") for name in trained} == set(adapter.modules)
        prompts = model.encode(["tin"])
        model.predict(model.noise([0]), 500, prompts).square().mean().backward()
        layer = student.base_model.model.get_submodule(adapter.modules[0])
        assert layer.lora_B["default"].weight.grad.abs().sum() > 0
        deltas = low_rank_deltas(student, adapter)
    assert (wanted - said).abs().max() > 0.01
    assert deltas.keys() == {f"{path}.weight" for path in adapter.modules}
    with Edit(model.fingerprint, deltas=deltas).applied(model):
        # W x + B (A x) against (W + B A) x in float32, on noise of size 1
        torch.testing.assert_close(noise(model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", ["unet.conv_in", "conv_in", "unet.down_blocks.9.to_k", ""])
def test_a_path_that_is_no_linear_layer_is_refused_before_anything_is_changed(path):
    model = tiny_pipeline("sd1")
    before, about = state(model), everything_about(model)
    with (
        pytest.raises(ValueError, match=f"{path!r} is no linear layer"),
        inserted(model, Adapter(2, 2.0, 0.0, (*model.projections, path)), 0),
    ):
        pass
    assert same(before, state(model)) and everything_about(model) == about
