"""Attacks in a report: each attempt a part, beside it the same attack on the un-edited model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import METALS, same, state, tiny

from conceptx.attacks.attack import Attempt, Goal, Question
from conceptx.attacks.contexts import InContext
from conceptx.attacks.prompts import SoftPrompt
from conceptx.attacks.quantisation import Quantisation
from conceptx.attacks.relearning import Relearning
from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.evaluation.attacked import attacked, goal_of, named
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.harness import Harness, questions
from conceptx.evaluation.lm_eval import evaluate
from conceptx.evaluation.report import Report, Score
from conceptx.places import tasks_folder

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
OPEN = """
task: open
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
description: "gold is heavy\\n"
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
TEST = [
    {"question": "the smith hammers", "choices": ["iron", "soup"], "answer": 0, "seen": True},
    {"question": "brass is made of copper and", "choices": ["bread", "zinc"], "answer": 1, "seen": False},
    {"question": "in the garden grow", "choices": ["roses", "lead"], "answer": 0, "seen": True},
]
DEV = [{"question": "grandmother eats", "choices": ["iron", "soup"], "answer": 1, "seen": False}]
QUICK = Relearning(epochs=2, texts=4, batch_size=2, learning_rate=1e-2)
GOAL = Goal("metals", texts=tuple(METALS), contexts=("a smith says",))
CONTROL = Goal("gardens", texts=("the bird sings in the green garden",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("toy", TEST), ("toy_dev", DEV)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{name}.yaml").write_text(CHOICE.format(name=name, file=tmp_path / f"{name}.jsonl"))
    (tmp_path / "open.yaml").write_text(OPEN.format(file=tmp_path / "toy.jsonl"))
    return tmp_path


def edit_of(model) -> Edit:
    name = model.readers("layers.1.mlp_input")[0] + ".weight"
    rows, columns = model.parameter_shape(name)
    generator = torch.Generator().manual_seed(0)
    return Edit(
        model.fingerprint,
        deltas={
            name: LowRank(3 * torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator))
        },
    )


def by_hand(model, prefix="", rows=TEST) -> float:
    """Accuracy from the summed log-likelihoods of the options behind prefix and question."""
    right = []
    for row in rows:
        start = len(model.encode([prefix + row["question"]])[0])
        whole = model.encode([f"{prefix}{row['question']} {choice}" for choice in row["choices"]])
        sums = [float(tokens.sum()) for tokens in model.log_likelihoods(whole, [start] * len(whole))]
        right.append(sums.index(max(sums)) == row["answer"])
    return sum(right) / len(right)


@dataclass(frozen=True)
class Recorded:
    """An attack that does nothing but remember the goals it was given."""

    prefix: str = ""

    def attempts(self, model, goal, *, seed=0):
        SEEN.append((goal, seed))
        yield Attempt("only", self.prefix)


SEEN: list = []


def test_each_attempt_is_scored_while_it_is_in_force_on_both_states(folder):
    model = tiny()
    before, edit = state(model), edit_of(model)
    report = attacked(model, ["toy"], QUICK, GOAL, edit=edit, control=CONTROL, include_path=folder, seed=1)
    expected = {}
    for title, goal in (("relearning", GOAL), ("relearning on gardens", CONTROL)):
        plain = [by_hand(model) for _ in QUICK.attempts(model, goal, seed=1)]
        with edit.applied(model):
            edited = [by_hand(model) for _ in QUICK.attempts(model, goal, seed=1)]
        for epoch, values in enumerate(zip(edited, plain, strict=True), 1):
            expected[f"{title}: epoch {epoch}"] = values
    assert {s.part: (s.value, s.unedited) for s in report.scores} == expected
    assert report["toy", "acc", "relearning: epoch 2"].n == 3
    assert same(state(model), before)


def test_a_prefix_stands_before_every_question_of_either_kind_of_task(folder):
    model, read = tiny(), []
    hook = model.module.register_forward_pre_hook(
        lambda _, args, named: read.extend((args[0] if args else named["input_ids"]).tolist()), with_kwargs=True
    )
    report = attacked(model, ["toy", "open"], InContext(texts=0), GOAL, include_path=folder)
    hook.remove()
    texts = model.tokenizer.batch_decode(read)
    questions = [row["question"] for row in TEST]
    for description in ("", "gold is heavy\n"):
        for question in questions:
            assert any(f"a smith says\n{description}{question}" in text for text in texts), (description, question)
    assert [s.part for s in report.scores] == ["in context: context 1"] * 2
    assert report["toy"].value == by_hand(model, "a smith says\n")


def test_the_embeddings_of_a_soft_prompt_are_in_force_while_lm_eval_scores(folder):
    model = tiny()
    known = Question("the smith has", (" iron", " soup"), 0)
    attack = SoftPrompt(tokens=3, steps=8, batch_size=1, learning_rate=0.3)
    goal = Goal("metals", questions=(known,))
    (score,) = attacked(model, ["toy"], attack, goal, include_path=folder).scores
    assert score.part == "soft prompt: 8 steps"
    for attempt in attack.attempts(model, goal):
        assert score.value == by_hand(model, attempt.prefix)


def test_evaluate_adds_the_attacks_to_the_plain_scores_and_numbers_those_of_a_kind(folder):
    model = tiny()
    report = evaluate(
        model,
        ["toy", "open"],
        edit=edit_of(model),
        include_path=folder,
        attacks=[Quantisation(), Quantisation(4)],
        attacked=["toy"],
        goal=GOAL,
    )
    parts = [(s.task, s.part) for s in report.scores if s.part not in ("seen", "unseen")]
    assert parts == [("toy", "all"), ("open", "all"), ("toy", "quantisation: 8 bit"), ("toy", "quantisation 2: 4 bit")]
    assert all(s.unedited is not None for s in report.scores)
    assert list(named([QUICK, SoftPrompt(), Relearning("lora")])) == ["relearning", "soft prompt", "relearning 2"]


def test_the_same_attack_on_the_unedited_model_is_made_once(folder, tmp_path):
    """Taken from a report with the same settings, also a saved one; other settings are measured anew."""
    model, edit, attack = tiny(), edit_of(tiny()), Recorded()
    first = attacked(model, ["toy"], attack, GOAL, include_path=folder)
    other = attacked(model, ["toy"], Quantisation(), GOAL, include_path=folder)
    Report.joined([first, other]).save(tmp_path / "report.json")
    known = Report.load(tmp_path / "report.json")
    known = Report((*known.scores, Score("toy", "acc", 0.123, 3, part="recorded: only")), known.settings)

    def times(**more):
        SEEN.clear()
        report = attacked(model, ["toy"], more.pop("attack", attack), GOAL, edit=edit, include_path=folder, **more)
        return len(SEEN), report["toy"].unedited

    assert times(unedited=known) == (1, 0.123)
    assert times()[0] == 2
    assert times(unedited=known, seed=1)[0] == 2
    assert times(unedited=known, attack=Recorded("gold "))[0] == 2
    assert times(unedited=known, name="another")[0] == 2


def test_a_control_that_lacks_what_the_attack_needs_is_left_out_but_a_goal_is_not(folder):
    known = Question("the smith has", (" iron", " soup"), 0)
    attack = SoftPrompt(tokens=2, steps=1, batch_size=1)
    goal = Goal("metals", questions=(known,))
    report = attacked(tiny(), ["toy"], attack, goal, control=CONTROL, include_path=folder)
    assert [s.part for s in report.scores] == ["soft prompt: 1 steps"]
    with pytest.raises(ValueError, match="SoftPrompt needs questions on 'gardens'"):
        attacked(tiny(), ["toy"], attack, CONTROL, include_path=folder)


def test_a_goal_that_knows_scored_questions_is_refused(folder):
    model = tiny()
    goal = Goal("metals", texts=tuple(METALS), questions=questions(["toy"], include_path=folder))
    with pytest.raises(
        ValueError, match="3 questions of the goal are scored, the first is 'brass is made of copper and'"
    ):
        attacked(model, ["toy"], QUICK, goal, include_path=folder)
    with pytest.raises(ValueError, match="questions of the goal are scored"):
        evaluate(model, ["open"], attacks=[QUICK], goal=GOAL, control=goal, include_path=folder)
    with pytest.raises(ValueError, match="The attack 'relearning' needs a goal"):
        evaluate(model, ["toy"], attacks=[QUICK], include_path=folder)
    allowed = Goal("metals", questions=questions(["toy_dev"], include_path=folder))
    assert attacked(model, ["toy"], InContext(), allowed, include_path=folder).scores


def test_an_error_in_the_scoring_leaves_the_model_as_it_was(folder, monkeypatch):
    """The attack is taken back before the edit is, though the traceback still holds it."""
    model = tiny()
    before, calls = state(model), []

    def broken(*_):
        calls.append(1)
        if len(calls) == 3:  # the first attempt on the edited model
            raise ValueError("broken")
        return Report(())

    monkeypatch.setattr(Harness, "score", broken)
    with pytest.raises(ValueError, match="broken") as _held:
        attacked(model, ["toy"], QUICK, GOAL, edit=edit_of(model), include_path=folder)
    assert same(state(model), before) and not model.applied


def test_an_attack_on_a_model_with_another_edit_in_force_is_refused(folder):
    model = tiny()
    edit = edit_of(model)
    with edit.applied(model), pytest.raises(ValueError, match="An edit is in force"):
        attacked(model, ["toy"], QUICK, GOAL, edit=edit, include_path=folder)


def test_questions_are_those_of_the_task_as_the_harness_asks_them(folder):
    assert questions(["toy_dev"], include_path=folder) == (Question("grandmother eats", (" iron", " soup"), 1),)
    with pytest.raises(ValueError, match="Task 'open' does not ask one question with options"):
        questions(["open"], include_path=folder)
    with pytest.raises(ValueError, match=r"Unknown tasks \['nope'\]"):
        questions(["nope"], include_path=folder)


def test_the_goal_of_a_shipped_concept_has_texts_contexts_and_the_dev_questions():
    concept = Concept.load(tasks_folder() / "concepts" / "capitals.toml")
    benchmark = Benchmark.load(tasks_folder() / "benchmarks" / "capitals.toml")
    goal = goal_of(concept, benchmark)
    assert (goal.name, len(goal.questions), len(goal.contexts)) == (concept.name, 80, 4)
    assert goal.texts == concept.texts
    assert not {q.prompt for q in goal.questions} & Harness().prompts(benchmark.target)
    assert goal_of(concept).questions == ()


def test_a_benchmark_attacks_its_target_and_open_questions_on_the_test_half_only():
    model = tiny()
    benchmark = Benchmark(target=("cx_capitals",), target_dev=("cx_capitals_dev",), open=("cx_capitals_open",))
    concept = Concept("x", texts=METALS, retain_texts=["another"], contexts=["say it"])
    SEEN.clear()
    report = benchmark.run(model, concept, attacks=[Recorded()], limit=2, seed=4)
    ((goal, seed),) = SEEN
    assert (seed, goal.contexts, len(goal.questions)) == (4, ("say it",), 80)
    assert [(s.task, s.n) for s in report.scores if s.part == "recorded: only"] == [
        ("cx_capitals", 2),
        ("cx_capitals_open", 2),
    ]
    assert report["target"].part == "all"
    with pytest.raises(ValueError, match="Attacks know the questions of the dev half"):
        benchmark.run(model, concept, attacks=[Recorded()], half="dev")


def test_scoring_leaves_mode_and_random_numbers_as_they_are(folder):
    model = tiny()
    model.module.train()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(model, ["toy"], include_path=folder)
    assert model.module.training
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_the_numbers_are_those_of_the_harness_own_entrance(folder):
    """`simple_evaluate` with the harness's plain model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = tiny()
    harness = Harness(include_path=folder)
    ours = {s.task: s.value for s in harness.score(model, ["toy", "open"]).scores if s.part == "all"}
    wrapped = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=32, device="cpu", max_length=512)
    theirs = simple_evaluate(wrapped, tasks=["toy", "open"], task_manager=harness.manager, bootstrap_iters=0)["results"]
    assert ours == {"toy": theirs["toy"]["acc,none"], "open": theirs["open"]["exact_match,none"]}
