"""The optimisation loop: AdamW by hand, and a stopped run that goes on as if it had not stopped."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from conceptx.models.modes import evaluating
from conceptx.progress import heard_by
from conceptx.train.loop import Plan, train, training

PLAN = Plan(steps=7, learning_rate=1e-2, seed=3, run="this run", checkpoint_every=2)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = torch.nn.Linear(5, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
    layers[0].bias.requires_grad_(False)  # what is frozen stays
    return torch.nn.Sequential(*layers)


def parts_of(step):
    """Two batches that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 5, generator=generator) for _ in range(2)]


def loss_of(student, part):
    return student(part).square().mean()


def trained(plan=PLAN, parts=parts_of, loss=loss_of):
    student = network()
    train(student, parts, loss, plan, Accelerator(cpu=True))
    return student.state_dict()


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def stop_at(step):
    def parts(number):
        if number == step:
            raise InterruptedError
        return parts_of(number)

    return parts


def test_it_is_adamw_on_the_sum_of_the_parts():
    student = network().eval()
    plan = replace(PLAN, steps=3, gradient_clip=0.05)
    for module in student:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    reference = network()
    reference[1].p = 0.0
    train(student, parts_of, loss_of, plan, Accelerator(cpu=True))
    free = [p for p in reference.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(free, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    for step in range(3):
        optimiser.zero_grad()
        sum(loss_of(reference, part) for part in parts_of(step)).backward()
        torch.nn.utils.clip_grad_norm_(free, plan.gradient_clip)
        optimiser.step()
    for name, tensor in reference.state_dict().items():
        # gradients summed one after the other or at once: the last bits, which Adam's division keeps at 1e-7 a step
        torch.testing.assert_close(student.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert torch.equal(student[0].bias, network()[0].bias)


def test_the_same_plan_gives_the_same_parameters_and_another_seed_others():
    one, again, other = trained(), trained(), trained(replace(PLAN, seed=4))
    assert same(one, again) and not same(one, other)  # the seed draws the dropout


def test_the_users_random_state_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    trained()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("step", range(8))
def test_a_stopped_run_goes_on_to_the_same_parameters(step, tmp_path):
    plan = replace(PLAN, checkpoint=tmp_path / "training.safetensors")
    if step < plan.steps:
        with pytest.raises(InterruptedError):
            trained(plan, stop_at(step))
    else:
        trained(plan)  # already finished
    done = []
    resumed = trained(plan, lambda number: done.append(number) or parts_of(number))
    assert same(resumed, trained())
    assert done == list(range(step - step % 2 if step < 7 else 7, 7))  # from the last checkpoint on


def test_a_stop_while_the_checkpoint_is_written_leaves_the_older_one(tmp_path, monkeypatch):
    from conceptx import store

    plan = replace(PLAN, checkpoint=tmp_path / "training.safetensors")
    with pytest.raises(InterruptedError):
        trained(plan, stop_at(3))

    def half(tensors, path, _):
        path.write_bytes(b"\x00" * 9)
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(store, "save_file", half)
        trained(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]
    assert same(trained(plan), trained())


def test_the_checkpoint_of_another_run_or_of_no_run_is_refused(tmp_path):
    from safetensors.torch import save_file

    plan = replace(PLAN, checkpoint=tmp_path / "training.safetensors")
    trained(plan)
    with pytest.raises(ValueError, match="checkpoint of another run; delete it"):
        trained(replace(plan, run="another"))
    whole = plan.checkpoint.read_bytes()
    plan.checkpoint.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        trained(plan)
    save_file({"x": torch.ones(2)}, plan.checkpoint)
    with pytest.raises(ValueError, match=r"lacks the tensors \['run', 'step'\]"):
        trained(plan)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(bad):
    student = network()
    at_two = iter([0, 0, 0, 0, bad, 0])
    with pytest.raises(FloatingPointError, match="not finite at step 2; lower the learning rate"):
        train(student, parts_of, lambda s, part: loss_of(s, part) + next(at_two), PLAN, Accelerator(cpu=True))
    assert same(student.state_dict(), trained(replace(PLAN, steps=2)))


def test_progress_is_reported_after_every_step():
    heard = []
    with heard_by(lambda *report: heard.append(report)):
        trained()
    assert [(what, done, total) for what, done, total, _ in heard] == [("training", n, 7) for n in range(1, 8)]
    assert all(note.startswith("loss ") for *_, note in heard)


def test_the_schedule_scales_the_learning_rate_of_each_step():
    """A rate of zero after the first half of the steps leaves the parameters where the half plan ends."""
    half = trained(replace(PLAN, steps=3, schedule=lambda done: 1.0))
    stopped = trained(replace(PLAN, steps=6, schedule=lambda done: float(done < 0.5)))
    assert same(half, stopped) and same(half, trained(replace(PLAN, steps=3)))


def test_the_average_is_the_running_mean_of_the_parameters():
    plan = replace(PLAN, average=0.3)
    states = [trained(replace(PLAN, steps=steps)) for steps in range(1, PLAN.steps + 1)]
    expected = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    for step, state in enumerate(states):
        decay = min(0.3, (step + 1) / (step + 10))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in expected}
    for name, tensor in trained(plan).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)  # float32 sums in another order


def test_a_stopped_run_goes_on_with_its_average(tmp_path):
    plan = replace(PLAN, average=0.5, checkpoint=tmp_path / "average.safetensors")
    whole = trained(replace(plan, checkpoint=None))
    with pytest.raises(InterruptedError):
        trained(plan, stop_at(5))
    assert same(whole, trained(plan))


def test_looking_at_the_student_between_steps_changes_nothing():
    """Dropout off, random numbers drawn, gradients off: the parameters are those of a training without a pause."""
    student, done = network(), []
    with torch.no_grad():
        for step in training(student, parts_of, loss_of, PLAN, Accelerator(cpu=True)):
            assert not torch.is_grad_enabled()  # the caller's own mode
            with evaluating(student):
                student(torch.randn(3, 5))
            done.append(step)
    assert done == list(range(1, 8)) and same(student.state_dict(), trained())


def test_a_training_that_is_left_early_has_done_its_steps():
    student = network()
    steps = training(student, parts_of, loss_of, PLAN, Accelerator(cpu=True))
    assert [next(steps), next(steps)] == [1, 2]
    steps.close()
    assert same(student.state_dict(), trained(replace(PLAN, steps=2)))


def test_the_fused_optimiser_is_adamw_as_well():
    for name, tensor in trained(replace(PLAN, fused=True)).items():
        # another order of the same float32 operations: the last bits, a few steps on
        torch.testing.assert_close(tensor, trained()[name], rtol=0, atol=1e-6)
