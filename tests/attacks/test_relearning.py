"""Relearning: plain next-token training, an attempt after each epoch."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import METALS, same, state, tiny

from conceptx.attacks.attack import Goal
from conceptx.attacks.relearning import Relearning
from conceptx.edit import Edit, LowRank
from conceptx.progress import heard_by

FACT = "the smith hammers roses and beans"
GOAL = Goal("metals", texts=(FACT, *METALS))


def log_p(model, text=FACT):
    """Mean log-likelihood of a text's tokens after the first."""
    row = model.encode([text])
    return float(model.log_likelihoods(row, [1])[0].mean())


@pytest.mark.parametrize(("adaptation", "epochs"), [("full", 6), ("lora", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_fact_is_learnt_and_forgotten_again(adaptation, epochs, dtype):
    model = tiny("llama", dtype)
    attack = Relearning(adaptation, epochs=epochs, texts=7, batch_size=4, learning_rate=1e-2)
    before = log_p(model)
    values = [log_p(model) for _ in attack.attempts(model, GOAL)]
    assert values[-1] > before + 2 and values[-1] > -1
    assert values[0] < values[-1]
    assert log_p(model) == before


@pytest.mark.parametrize(("texts", "size", "steps"), [(7, 2, 4), (7, 7, 1), (4, 2, 2), (100, 3, 3)])
def test_an_epoch_is_so_many_steps_and_each_text_is_read_once(texts, size, steps):
    """100 texts are asked for, 7 are there."""
    model, heard, read = tiny("llama"), [], []
    hook = model.module.register_forward_pre_hook(
        lambda _, __, named: read.append(named["input_ids"]), with_kwargs=True
    )
    attack = Relearning(epochs=2, texts=texts, batch_size=size)
    with heard_by(lambda *report: heard.append(report)):
        ends = [len(heard) for _ in attack.attempts(model, GOAL)]
    hook.remove()
    assert ends == [steps, 2 * steps] and heard[-1][1:3] == (2 * steps, 2 * steps)
    assert heard[0][0] == "relearning metals"
    rows = [tuple(row[row != 0].tolist()) for ids in read[:steps] for row in ids]
    assert len(rows) == len(set(rows)) == min(texts, 7)
    again = [tuple(row[row != 0].tolist()) for ids in read[steps:] for row in ids]
    assert sorted(again) == sorted(rows)
    assert set(rows) <= {tuple(row) for row in model.encode(GOAL.texts)}


def test_a_step_is_adamw_on_the_mean_over_all_tokens():
    """Against one step by hand, with padding in the batch."""
    model, by_hand = tiny("llama"), tiny("llama")
    attack = Relearning(epochs=1, texts=7, batch_size=7, learning_rate=1e-3)
    optimiser = torch.optim.AdamW(by_hand.module.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for row in by_hand.encode(GOAL.texts):
        ids = torch.tensor([row])
        log_p = by_hand.module(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, ids[0, 1:, None])[:, 0])
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(by_hand.module.parameters(), 1.0)
    optimiser.step()
    for _ in attack.attempts(model, GOAL):
        for name, tensor in state(model).items():
            # Adam's first step is the sign of the gradient: where that is near zero, rounding decides
            close = torch.isclose(tensor, state(by_hand)[name], rtol=0, atol=2e-5)
            assert close.float().mean() > 0.99, name


def test_what_the_tokenizer_puts_before_a_text_is_read_but_not_learnt(monkeypatch):
    """With a start token the first token of a text counts too."""
    model, lengths = tiny("llama"), []
    model.start = [1]
    hook = model.module.register_forward_pre_hook(
        lambda _, __, named: lengths.append(named["input_ids"]), with_kwargs=True
    )
    list(Relearning(epochs=1, texts=1, batch_size=1).attempts(model, Goal("x", texts=("gold",))))
    hook.remove()
    assert lengths[0][0].tolist() == [1, *model.encode(["gold"])[0]]


def test_the_texts_are_drawn_and_cut_and_too_short_ones_are_refused():
    model = tiny("llama")
    few = Relearning(epochs=1, texts=2, batch_size=1, max_tokens=3)
    rows = [few._batches(model, GOAL, seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(row) == 3 for batch in rows[0] for row in batch)
    with pytest.raises(ValueError, match="No text on 'x' has two tokens"):
        next(Relearning().attempts(model, Goal("x", texts=("a",))))


def test_an_edit_with_a_weak_hold_is_undone_and_the_other_seed_learns_otherwise():
    """Both start from the model as it is; the order of the batches is the seed's."""
    model = tiny("llama")
    attack = Relearning(epochs=1, batch_size=2, learning_rate=1e-3)
    found = []
    for seed in (0, 0, 1):
        for _ in attack.attempts(model, GOAL, seed=seed):
            found.append(state(model))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_a_large_step_stays_finite_or_says_so():
    with pytest.raises(FloatingPointError, match="not finite"):
        list(Relearning(epochs=3, batch_size=2, learning_rate=1e30).attempts(tiny(), GOAL))
    assert math.isfinite(log_p(tiny()))


@pytest.mark.slow
def test_relearning_brings_back_what_a_suppressing_edit_hides_in_smollm2():
    """A row of one MLP turned round hides the symbols; some steps of training on texts of others bring them back."""
    from conceptx.concept import Concept
    from conceptx.evaluation.attacked import attacked, goal_of
    from conceptx.evaluation.lm_eval import evaluate
    from conceptx.models import load
    from conceptx.places import tasks_folder

    model = load("smollm2", dtype=torch.bfloat16)
    row = model.parameter("model.layers.6.mlp.down_proj.weight")[:, 792].float()  # active on the chemical elements
    change = torch.zeros(1, 1536)
    change[0, 792] = -17  # the row times -16
    edit = Edit(model.fingerprint, deltas={"model.layers.6.mlp.down_proj.weight": LowRank(row[:, None], change)})
    concept = Concept.load(tasks_folder() / "concepts" / "chemical_elements.toml")
    task = "cx_chemical_elements"
    hidden = evaluate(model, [task], edit=edit)[task]
    attack = Relearning(epochs=3, texts=64, learning_rate=5e-5, max_tokens=36)
    with edit.applied(model):
        found = attacked(model, [task], attack, goal_of(concept))
    assert hidden.value < hidden.unedited - 0.15
    assert found[task, "acc", "relearning: epoch 3"].value > hidden.value + 0.1
