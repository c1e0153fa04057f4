"""What holds for every attack on a language model: it is in force while it is the current one, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hosts import METALS, logits, same, state, tiny

from conceptx import attacks
from conceptx.attacks.attack import Goal, Question
from conceptx.attacks.contexts import InContext
from conceptx.attacks.prompts import GreedyCoordinateGradient, SoftPrompt
from conceptx.attacks.quantisation import Quantisation, rounded
from conceptx.attacks.relearning import Relearning
from conceptx.edit import Edit, LowRank
from conceptx.geometry import Subspace

QUESTIONS = (
    Question("the smith hammers", (" roses", " the hot iron"), 1),
    Question("brass is made of copper and", (" zinc", " soup"), 0),
    Question("at a low heat melt tin and", (" lead", " bread"), 0),
)
GOAL = Goal("metals", texts=tuple(METALS), questions=QUESTIONS, contexts=("A smith says:", "Exam in metals."))
ATTACKS = {
    "full": Relearning(epochs=2, texts=4, batch_size=2, learning_rate=1e-2),
    "lora": Relearning("lora", epochs=2, texts=4, batch_size=2, learning_rate=1e-2, rank=2),
    "soft": SoftPrompt(tokens=3, steps=2, batch_size=2),
    "discrete": GreedyCoordinateGradient(tokens=2, steps=1, width=3, top_k=8, questions=2),
    "contexts": InContext(),
    "8 bit": Quantisation(),
    "4 bit": Quantisation(4, group=5),
}
CHANGES_WEIGHTS = {"full", "lora", "8 bit", "4 bit"}


def edit_of(model):
    """An edit with a weight change and an activation map."""
    name = model.readers("layers.1.mlp_input")[0] + ".weight"
    rows, columns = model.parameter_shape(name)
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator))
    direction = torch.randn(model.width("layers.1.output"), 1, generator=generator, dtype=torch.float64)
    maps = {"layers.1.output": (Subspace.orthogonal(direction).removal(),)}
    return Edit(model.fingerprint, deltas={name: delta}, maps=maps)


def flags(model):
    """Everything beside the numbers that an attack could leave behind."""
    module = model.module
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    modes = [m.training for m in module.modules()]
    wanting = [(name, p.requires_grad, p.grad is None, p.dtype) for name, p in module.named_parameters()]
    return hooks, modes, wanting, [id(p) for p in module.parameters()]


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_edited_model_is_bit_identical_after_all_attempts_after_one_and_after_an_error(name, kind):
    model = tiny(kind, torch.bfloat16 if kind == "llama_tied" else torch.float32)
    next(model.module.parameters()).requires_grad_(False)
    list(model.module.modules())[-1].train()
    with edit_of(model).applied(model):
        before, known, said = state(model), flags(model), logits(model)
        list(ATTACKS[name].attempts(model, GOAL))
        assert same(state(model), before) and flags(model) == known

        stopped = ATTACKS[name].attempts(model, GOAL)
        next(stopped)
        stopped.close()
        assert same(state(model), before) and flags(model) == known

        broken = ATTACKS[name].attempts(model, GOAL)
        next(broken)
        with pytest.raises(KeyboardInterrupt):
            broken.throw(KeyboardInterrupt)
        assert same(state(model), before) and flags(model) == known
        assert torch.equal(logits(model), said)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attempt_is_in_force_while_it_is_the_current_one(name):
    """In its weights, or in what it puts before the text; the same seed gives the same."""
    model = tiny("llama", torch.bfloat16)
    plain, found = logits(model, ["the smith"]), []
    for _ in range(2):
        for attempt in ATTACKS[name].attempts(model, GOAL, seed=3):
            assert not model.module.training
            assert next(model.module.parameters()).dtype == torch.bfloat16
            assert attempt.prefix == "" or attempt.prefix[-1].isspace()
            found.append((attempt, logits(model, [attempt.prefix + "the smith"])))
    half = len(found) // 2
    for (attempt, said), (again, same_again) in zip(found[:half], found[half:], strict=True):
        assert attempt == again and torch.equal(said, same_again)
        assert attempt.prefix or name in CHANGES_WEIGHTS
        assert not torch.equal(said[-len(plain) :], plain)
    assert len({attempt.name for attempt, _ in found}) == half


@pytest.mark.parametrize("name", ATTACKS)
def test_the_users_random_numbers_are_left_alone(name):
    model = tiny()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(ATTACKS[name].attempts(model, GOAL))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "field"), [("full", "texts"), ("lora", "texts"), ("soft", "questions"), ("discrete", "questions")]
)
def test_a_goal_without_what_the_attack_needs_is_refused(name, field):
    with pytest.raises(ValueError, match=rf"needs {field} on 'nothing'; the goal has none\.$"):
        next(ATTACKS[name].attempts(tiny(), Goal("nothing")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relearning("half"), "adaptation must be full or lora, got 'half'"),
        (lambda: Relearning(epochs=0, rank=-1), "epochs, rank must be positive"),
        (lambda: Relearning(weight_decay=-1), "weight_decay must not be negative"),
        (lambda: SoftPrompt(tokens=0), "tokens must be positive"),
        (lambda: SoftPrompt(weight_decay=float("nan")), "weight_decay must not be negative"),
        (lambda: GreedyCoordinateGradient(width=0), "width must be positive"),
        (lambda: InContext(texts=-1), "texts and questions must not be negative"),
        (lambda: Quantisation(3), "bits must be 8 or 4, got 3"),
        (lambda: Quantisation(4, group=0), "group must be positive"),
        (lambda: Question("who?", (" a", " b"), 2), "with 2 options has no answer 2"),
        (lambda: Question("who?", (" ", " b"), 0), "needs a prompt and a right answer"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_attack_of_the_command_line_is_there_and_settings_come_from_json():
    from conceptx.settings import build

    assert all(hasattr(getattr(attacks, name), "attempts") for name in attacks.LANGUAGE.values())
    assert attacks.__all__ == sorted(attacks.__all__) and set(attacks.__all__) == set(attacks.MODULES)
    assert build(Relearning, {"adaptation": "lora", "epochs": 2}) == Relearning("lora", 2)
    assert build(Quantisation, {"bits": 4}) == Quantisation(4)
    with pytest.raises(ValueError, match="Quantisation has no setting bit; it has bits, group"):
        build(Quantisation, {"bit": 4})
    with pytest.raises(AttributeError, match="There is no attack 'Nothing'; available: Goal"):
        attacks.Nothing  # noqa: B018


# -- contexts ------------------------------------------------------------------------------------------------------


def test_contexts_are_the_texts_the_answered_questions_and_the_phrases():
    found = {a.name: a.prefix for a in InContext(texts=2, questions=2).attempts(tiny(), GOAL, seed=1)}
    assert list(found) == ["texts", "few-shot", "context 1", "context 2"]
    assert {*found["texts"].splitlines()} < {*METALS} and len(found["texts"].splitlines()) == 2
    assert {*found["few-shot"].splitlines()} < {q.prompt + q.right for q in QUESTIONS}
    assert found["context 1"] == "A smith says:\n"


def test_contexts_are_only_those_that_the_goal_has():
    only = Goal("metals", contexts=("A smith says:",))
    assert [a.name for a in InContext().attempts(tiny(), only)] == ["context 1"]
    assert [a.name for a in InContext(texts=0, questions=0).attempts(tiny(), GOAL)] == ["context 1", "context 2"]
    with pytest.raises(ValueError, match="InContext needs texts, questions or contexts on 'nothing'"):
        next(InContext().attempts(tiny(), Goal("nothing")))


# -- quantisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 40), (4, 16), (4, 7)])
def test_rounding_errs_by_half_a_step_takes_few_values_and_is_idempotent(bits, group, dtype):
    torch.manual_seed(0)
    weight = torch.randn(6, 40).to(dtype)
    weight[2] = 0
    once = rounded(weight, bits, group)
    assert once.dtype == dtype and torch.equal(rounded(once, bits, group), once)
    for before, after in zip(weight.split(group, 1), once.split(group, 1), strict=True):
        step = before.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        grain = step * 2.0**-9 * 2**bits if dtype == torch.bfloat16 else step * 1e-5  # of the type itself
        assert ((after.double() - before.double()).abs() <= step / 2 + grain).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in after)
        assert torch.equal(after.abs().amax(1), before.abs().amax(1))  # the largest weight is on the grid


def test_only_the_linear_layers_of_the_blocks_are_rounded_each_by_output_row():
    """GPT-2 stores its weights the other way round."""
    for kind in ("llama", "gpt2"):
        model = tiny(kind)
        before = state(model)
        for attempt in Quantisation().attempts(model, GOAL):
            assert attempt.name == "8 bit"
            changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
            assert len(changed) == model.depth * (7 if kind == "llama" else 4)
            name = sorted(changed)[0]
            original = before[name].T if kind == "gpt2" else before[name]
            assert torch.equal(model.parameter(name), rounded(original, 8, original.shape[1]))
