"""Prompts: a soft one raises the likelihood, a discrete one never lowers it and is the best there is in one slot."""

from __future__ import annotations

import pytest
import torch
from hosts import ALL, METALS, logits, tiny

from conceptx.attacks.attack import Goal, Question
from conceptx.attacks.embeddings import found, standing_in
from conceptx.attacks.prompts import BEHIND, Candidate, GreedyCoordinateGradient, Rows, SoftPrompt, stand_in

QUESTIONS = (
    Question("the smith hammers", (" roses", " the hot iron"), 1),
    Question("brass is made of copper and", (" zinc", " soup"), 0),
    Question("at a low heat melt tin and", (" lead", " bread"), 0),
    Question("the bird", (" lead", " sings in the garden"), 1),
)
GOAL = Goal("metals", questions=QUESTIONS)


def value(model, prefix, questions=QUESTIONS):
    """The mean log-likelihood of the right answers, by the wrapper's own scoring."""
    starts = [len(row) for row in model.encode([prefix + q.prompt for q in questions])]
    rows = model.encode([prefix + q.prompt + q.right for q in questions])
    return float(torch.stack([tokens.sum() for tokens in model.log_likelihoods(rows, starts)]).mean())


@pytest.mark.parametrize("kind", ALL)
def test_the_objective_is_the_log_likelihood_of_the_right_answers(kind):
    model = tiny(kind)
    with torch.no_grad():
        ours = Rows.of(model, "gold and" + BEHIND, QUESTIONS).log_p(model).mean()
    assert float(ours) == pytest.approx(value(model, "gold and" + BEHIND), abs=1e-3)


def test_an_answer_that_adds_no_token_is_refused(monkeypatch):
    model = tiny()
    monkeypatch.setattr(type(model), "encode", lambda self, texts: [[5, 6] for _ in texts])
    with pytest.raises(ValueError, match="The answer of 'the smith hammers' adds no token"):
        Rows.of(model, "", QUESTIONS)


# -- stand-ins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_stand_in_is_a_run_of_so_many_tokens_once_at_the_beginning(count):
    model = tiny()
    text, tokens = stand_in(model, count, QUESTIONS)
    assert len(tokens) == count
    for question in QUESTIONS:
        (row,) = model.encode([text + BEHIND + question.prompt + question.right])
        assert row[:count] == tokens
        assert int(found(torch.tensor([row]), tokens).sum()) == 1


def test_a_stand_in_avoids_what_the_questions_hold_and_says_when_nothing_is_left():
    model = tiny()
    (first,) = stand_in(model, 1, QUESTIONS)[0]
    asked = [Question(f"the {first} sleeps", (" a",), 0)]
    assert stand_in(model, 1, asked)[0] != first
    everything = Question("§¤¶~|^qzxjwv", (" a",), 0)
    with pytest.raises(ValueError, match="No stand-in of 1 tokens: none of § ¤"):
        stand_in(model, 1, [everything])


def test_rows_that_stand_in_are_those_of_the_words_they_are_taken_from():
    """The referee is the model itself: "q" with the rows of "gold" is "gold". Single tokens (a cache) pass too."""
    model = tiny()
    table = model.module.get_input_embeddings()
    (gold,) = model.encode(["gold"])
    (marks,) = model.encode(["~" * len(gold)])
    with standing_in([table], marks, table(torch.tensor(gold)).detach()):
        assert torch.equal(logits(model, ["~" * len(gold) + " melts"]), logits(model, ["gold melts"]))
        plain = logits(model, [METALS[0]])
        greedy = model.generate(["~" * len(gold) + " melts"], max_new_tokens=4)
    assert torch.equal(plain, logits(model, [METALS[0]]))
    assert greedy == model.generate(["gold melts"], max_new_tokens=4)
    assert found(torch.tensor([[gold[0]]]), [*gold, 1]).shape == (1, 0)


# -- soft ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_soft_prompt_raises_the_likelihood_of_the_right_answers(kind):
    model = tiny(kind)
    attack = SoftPrompt(tokens=4, steps=25, batch_size=3, learning_rate=0.2)
    for attempt in attack.attempts(model, GOAL):
        assert attempt.name == "25 steps"
        after, without = value(model, attempt.prefix), value(model, "")
    assert after > without + 1
    assert after > value(model, attempt.prefix) + 1  # the stand-ins by themselves do not do it


def test_the_soft_prompt_is_read_in_training_as_it_is_in_force():
    """The loss of a last step that does not move is that of the attempt."""
    from conceptx.progress import heard_by

    model, heard = tiny(), []
    still = SoftPrompt(tokens=2, steps=1, batch_size=4, learning_rate=1e-12)
    with heard_by(lambda *report: heard.append(report)):
        for attempt in still.attempts(model, GOAL):
            assert heard[-1][:3] == ("soft prompt for metals", 1, 1)
            assert -value(model, attempt.prefix) == pytest.approx(float(heard[-1][3].split()[1]), rel=1e-3)


# -- discrete ------------------------------------------------------------------------------------------------------


def test_a_discrete_prompt_never_gets_worse_and_its_value_is_that_of_its_text():
    model = tiny()
    attack = GreedyCoordinateGradient(tokens=3, steps=6, width=24, top_k=32)
    values = []
    for best in attack.search(model, "metals", QUESTIONS):
        values.append(best.value)
        assert best.value == pytest.approx(value(model, best.prefix), abs=1e-3)
        assert model.encode([best.prefix])[0][:3] == list(best.tokens)
    assert len(values) == 7 and values == sorted(values) and values[-1] > values[0] + 0.5
    for attempt in attack.attempts(model, GOAL, seed=0):
        assert attempt.name == "6 steps" and value(model, attempt.prefix) > values[0]


def test_one_slot_and_one_step_over_the_whole_vocabulary_is_brute_force():
    """Every token that comes back from its own text is tried; the best of them is found."""
    model = tiny()
    size = model.module.get_input_embeddings().num_embeddings
    attack = GreedyCoordinateGradient(tokens=1, steps=1, width=size, top_k=size)
    *_, best = attack.search(model, "metals", QUESTIONS)
    every = []
    for token in range(2, len(model.tokenizer)):
        prefix = model.tokenizer.decode([token]) + BEHIND
        rows = model.encode([prefix + q.prompt for q in QUESTIONS])
        if all(row[0] == token for row in rows):
            every.append((value(model, prefix), prefix))
    assert len(every) > 100
    assert best.value == pytest.approx(max(every)[0], abs=1e-3) and best.prefix == max(every)[1]


def test_no_candidate_is_scored_twice_and_the_search_goes_on_without_any():
    model, scored = tiny(), []

    def note(_, __, named):
        scored.extend(tuple(row[row != 0].tolist()) for row in named["input_ids"])

    size = model.module.get_input_embeddings().num_embeddings
    attack = GreedyCoordinateGradient(tokens=1, steps=3, width=size, top_k=size)
    hook = model.module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        found = [best.value for best in attack.search(model, "metals", QUESTIONS[:1])]
    hook.remove()
    assert found[1] == found[2] == found[3]
    counts = {row: scored.count(row) for row in scored}
    # each once; the best ones once more in every step, for the gradient
    assert sum(count - 1 for count in counts.values()) == attack.steps


def test_the_gains_are_the_gradient_of_the_value():
    """Against finite differences: a small step from the token's embedding towards another one's."""
    model = tiny()
    text, tokens = stand_in(model, 2, QUESTIONS)
    candidate = Candidate.of(model, text, tokens, QUESTIONS)
    gains = candidate.gains(model)
    table = model.module.get_input_embeddings()
    rows = table(torch.tensor(tokens)).detach()
    for slot, other in ((0, 40), (1, 200)):
        towards = table.weight[other].detach() - rows[slot]
        ends = []
        for sign in (-1, 1):
            moved = rows.clone()
            moved[slot] += sign * 1e-3 * towards
            with standing_in([table], tokens, moved), torch.no_grad():
                ends.append(float(candidate.rows.log_p(model).mean()))
        slope = (ends[1] - ends[0]) / 2e-3
        assert float(gains[slot, other] - gains[slot, tokens[slot]]) == pytest.approx(slope, rel=0.05, abs=1e-2)


def test_a_text_that_is_cut_otherwise_or_holds_special_tokens_is_no_candidate():
    model = tiny()
    whole = model.encode(["gold"])[0]
    assert Candidate.of(model, "gold", whole, QUESTIONS) is not None
    letters = [model.encode([letter])[0][0] for letter in "gold"]
    assert Candidate.of(model, "gold", letters, QUESTIONS) is None
    assert Candidate.of(model, "<end>", [1], QUESTIONS) is None
