"""A LoRA adapter visits the user's model and leaves it as it was."""

import pytest
import torch
from hosts import ALL, logits, same, state, tiny

from conceptx import Edit
from conceptx.train.adapters import Adapter, inserted, linear_modules, low_rank_deltas


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
