"""The bridge to lm-evaluation-harness: the same numbers as by hand, in memory and from a saved adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts import tiny

from conceptx.concept import Concept
from conceptx.edit import Edit, LowRank
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.fluency import fluency
from conceptx.evaluation.lm_eval import evaluate
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel
from conceptx.places import tasks_folder

YAML = """
task: toy
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
ROWS = [
    {"question": "the smith hammers", "choices": ["iron", "soup", "roses", "the dog"], "answer": 0, "seen": True},
    {
        "question": "brass is made of copper and",
        "choices": ["zinc", "bread", "rain", "beans"],
        "answer": 0,
        "seen": False,
    },
    {"question": "in the garden grow", "choices": ["lead", "tin", "roses", "gold"], "answer": 2, "seen": True},
    {"question": "grandmother eats", "choices": ["iron", "zinc", "lead", "soup"], "answer": 3, "seen": False},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "toy.yaml").write_text(YAML.format(file=tmp_path / "rows.jsonl"))
    return tmp_path


def chosen_by_hand(model: LanguageModel, row: dict) -> int:
    """The option with the largest summed log-likelihood after the question."""
    start = len(model.encode([row["question"]])[0])
    rows = model.encode([f"{row['question']} {choice}" for choice in row["choices"]])
    sums = [float(tokens.sum()) for tokens in model.log_likelihoods(rows, [start] * len(rows))]
    return sums.index(max(sums))


def perturbation(model: LanguageModel, size: float = 3.0) -> Edit:
    name = model.readers("layers.1.mlp_input")[0] + ".weight"
    rows, columns = model.parameter_shape(name)
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
    return Edit(model.fingerprint, deltas={name: LowRank(size * up, down)})


def test_accuracy_is_that_of_summed_log_likelihoods_by_hand(folder: Path) -> None:
    model = tiny("llama")
    right = [chosen_by_hand(model, row) == row["answer"] for row in ROWS]
    report = evaluate(model, ["toy"], include_path=folder)
    assert report["toy", "acc", "all"].value == sum(right) / 4
    assert report["toy", "acc", "seen"].value == (right[0] + right[2]) / 2
    assert report["toy", "acc", "unseen"].n == 2
    assert report["toy"].chance == 0.25


def test_an_edit_is_scored_in_memory_with_the_unedited_value_beside_it(folder: Path) -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.module.state_dict().items()}
    edit = perturbation(model)
    with edit.applied(model):
        edited = [chosen_by_hand(model, row) == row["answer"] for row in ROWS]
    plain = evaluate(model, ["toy"], include_path=folder)
    score = evaluate(model, ["toy"], edit=edit, include_path=folder)["toy"]
    assert score.value == sum(edited) / 4
    assert score.unedited == plain["toy"].value
    assert all(torch.equal(before[name], p) for name, p in model.module.state_dict().items())


def test_unedited_scores_measured_before_are_used_as_they_are(folder: Path) -> None:
    model = tiny("llama")
    given = Report((Score("toy", "acc", 0.125, 4),))
    report = evaluate(model, ["toy"], edit=perturbation(model), unedited=given, include_path=folder)
    assert report["toy"].unedited == 0.125


def test_an_unknown_task_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown tasks \['nope'\]; available: toy"):
        evaluate(tiny("llama"), ["nope"], include_path=folder)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(tiny("llama"), ["toy"], include_path=folder)
    out = capfd.readouterr()
    assert "it/s" not in out.err
    assert out.out == ""


def test_fluency_of_the_unedited_model_is_its_own_perplexity() -> None:
    """A perturbed model writes what the un-edited one finds less likely."""
    model = tiny("llama")
    prompts = ["the smith", "grandmother waters", "rain falls on", "gold is"]
    plain = fluency(model, prompts, max_new_tokens=12)
    edited = fluency(model, prompts, edit=perturbation(model), max_new_tokens=12)
    assert fluency(model, prompts, edit=perturbation(model), unedited=plain, max_new_tokens=12) == edited
    assert edited["fluency", "reverse_perplexity"].unedited == plain["fluency", "reverse_perplexity"].value
    assert edited["fluency", "reverse_perplexity"].value > plain["fluency", "reverse_perplexity"].value


def test_a_report_survives_saving(tmp_path: Path) -> None:
    report = Report((Score("a", "acc", 0.5, 4, 0.1, "seen", 0.75, 0.25),), {"limit": None})
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_a_benchmark_refuses_prompts_that_are_training_texts() -> None:
    benchmark = Benchmark(target=("cx_capitals",), prompts=("the same text",))
    concept = Concept("x", texts=["the same text"], retain_texts=["another"])
    with pytest.raises(ValueError, match="1 prompts are texts of the concept"):
        benchmark.run(tiny("llama"), concept)


def test_the_summary_of_a_role_is_the_mean_over_its_items() -> None:
    benchmark = Benchmark(target=("t",), near=("a", "b"))
    scores = (Score("a", "acc", 1.0, 10, 0.0, unedited=0.5), Score("b", "acc", 0.5, 30, 0.1, unedited=0.5))
    near = benchmark.summary(Report(scores))["near"]
    assert (near.value, near.n, near.unedited) == (0.625, 40, 0.5)


@pytest.mark.slow
def test_the_plain_lm_eval_command_gives_the_same_accuracies(tmp_path: Path) -> None:
    """Saved, exported, loaded by another process as a plain peft adapter, scored by the harness's own command."""
    from conceptx.demo.language import recipe
    from conceptx.models import load
    from conceptx.testbeds import smollm2

    tasks = ["cx_chemical_elements", "cx_physics"]
    model = load("smollm2")
    concept = Concept.load(tasks_folder() / "concepts" / "chemical_elements.toml")
    settings = recipe().from_settings(
        {"steps": 30, "learning_rate": 2e-3, "fluency_weight": 0, "ramp": False, "eta": 20}
    )
    edit = settings.erase(model, concept)
    edit.export_peft(tmp_path / "adapter", model)
    ours = evaluate(model, tasks, edit=edit)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(tasks), "--device", "cpu"]
    arguments = f"pretrained={smollm2.convert()},peft={tmp_path / 'adapter'},dtype=float32"
    command += ["--model_args", arguments, "--include_path", str(tasks_folder() / "lm_eval")]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "32"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (found,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(found.read_text())["results"]
    for task in tasks:
        assert ours[task].value != ours[task].unedited
        # the adapter computes W x + B (A x), the applied edit (W + B A) x: rounding may flip one near-tie
        assert abs(theirs[task]["acc,none"] - ours[task].value) <= 1.01 / ours[task].n
