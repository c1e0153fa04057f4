"""Comparisons: cells that are kept, seeds that share an edit, intervals, the table and the picture."""

from __future__ import annotations

import json

import pytest
import torch
from hosts import GARDEN, METALS, tiny

from conceptx import Concept, Report, comparing
from conceptx.attacks import Relearning
from conceptx.comparing import Cell, Comparison, Contender, Subject, compare, interval, values
from conceptx.edit import Columns, Edit
from conceptx.eraser import Eraser
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.report import Score
from conceptx.models import LanguageModel

CONCEPT = Concept("metals", texts=METALS, retain_texts=GARDEN)
SUBJECT = Subject(CONCEPT, Benchmark(target=("toy",), open=("toy_open",)))
NAME = "model.layers.1.mlp.down_proj.weight"


class Nudge(Eraser):
    """Adds a constant to one column; with `noisy`, another one for each seed."""

    made = 0

    def __init__(self, noisy: bool = False, broken: bool = False) -> None:
        self.noisy, self.broken = noisy, broken

    def erase(self, model: LanguageModel, concept: Concept, *, seed: int = 0) -> Edit:
        type(self).made += 1
        if self.broken:
            raise FloatingPointError("The loss is not finite at step 3.")
        change = torch.full((32, 1), 1.0 + seed * self.noisy)
        return Edit(model.fingerprint, deltas={NAME: Columns(torch.tensor([4]), change)})


@pytest.fixture
def scored(monkeypatch):
    """Scores without a benchmark; the list says what was scored, and with which seed it was attacked."""
    asked: list[str] = []

    def run(self, model, concept, *, edit=None, unedited=None, limit=None):
        asked.append("plain")
        target = Score("target", "acc", 0.9 if edit is None else 0.4, 90, 0.05, chance=0.25)
        return Report((target, Score("general", "acc", 0.8, 400, 0.02), Score("p", "word_perplexity", 250.0, 60, 3.0)))

    def attacked(model, tasks, attack, goal, *, edit, unedited, control, seed, name, limit):
        asked.append(f"{name} {seed}")
        assert tasks == ("toy",) and (unedited is None) == (edit is None)
        scores = [Score("toy", "acc", 0.3 + 0.1 * epoch + seed / 100, 90, 0.05, f"{name}: {epoch}") for epoch in (1, 2)]
        return Report(tuple(scores))

    monkeypatch.setattr(Benchmark, "run", run)
    monkeypatch.setattr(comparing, "attacked", attacked)
    monkeypatch.setattr(comparing, "goal_of", lambda *_: None)
    monkeypatch.setattr(Nudge, "made", 0)
    return asked


def run(folder, contenders, seeds=(0, 1)):
    return compare(
        tiny(), {"metals": SUBJECT}, contenders, seeds=seeds, folder=folder, attacks={"relearning": Relearning()}
    )


def test_every_cell_is_written_and_none_is_made_twice(scored, tmp_path):
    contenders = [Contender("nudge", Nudge(noisy=True))]
    first = run(tmp_path, contenders)
    assert {(c.method, c.seed) for c in first.cells} == {("un-edited", 0), ("un-edited", 1), ("nudge", 0), ("nudge", 1)}
    assert scored.count("plain") == 3 and Nudge.made == 2
    count = len(scored)
    again = run(tmp_path, contenders)
    assert len(scored) == count and again.cells == first.cells
    (tmp_path / "metals" / "nudge-1" / "report.json").unlink()
    values_of = [c.report.scores for c in first.cells]
    assert [c.report.scores for c in run(tmp_path, contenders).cells] == values_of
    assert len(scored) == count + 2 and Nudge.made == 2  # the edit was there, the scores were not


def test_seeds_that_give_one_edit_share_its_scores_but_not_the_attacks(scored, tmp_path):
    comparison = run(tmp_path, [Contender("nudge", Nudge())], seeds=(0, 1, 2))
    assert scored.count("plain") == 2 and scored.count("relearning 2") == 2
    found = [values(c.report)["relearning"][1] for c in comparison.rows("metals")["nudge"]]
    assert found == pytest.approx([0.5, 0.51, 0.52])  # the highest of the epochs, with the seed's own number


def test_a_method_that_fails_leaves_its_sentence(scored, tmp_path):
    comparison = run(tmp_path, [Contender("broken", Nudge(broken=True)), Contender("nudge", Nudge())], seeds=(0,))
    failed = next(c for c in comparison.cells if c.failed)
    assert failed.method == "broken" and failed.failed == "The loss is not finite at step 3."
    assert "failed" in comparison.markdown("metals")
    run(tmp_path, [Contender("broken", Nudge(broken=True))], seeds=(0,))
    assert Nudge.made == 2


def test_other_settings_need_another_folder(scored, tmp_path):
    run(tmp_path, [Contender("nudge", Nudge())], seeds=(0,))
    with pytest.raises(ValueError, match="was made with other settings"):
        run(tmp_path, [Contender("nudge", Nudge(noisy=True))], seeds=(0,))
    with pytest.raises(ValueError, match="Two contenders have one name"):
        run(tmp_path, [Contender("nudge", Nudge()), Contender("nudge", Nudge())])
    with pytest.raises(FileNotFoundError, match="holds no cell"):
        Comparison.load(tmp_path / "nothing")


def test_a_cell_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "metals" / "nudge-0" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"scores": [], "settings": {"subject": "metals"}}))
    with pytest.raises(ValueError, match="is no cell of a comparison"):
        Comparison.load(tmp_path)


def test_the_interval_has_the_error_of_the_questions_and_that_of_the_seeds():
    one = Score("target", "acc", 0.5, 100, 0.05)
    assert interval([one]) == (0.5, pytest.approx(1.96 * 0.05))
    # the seeds share their questions: more seeds do not make the error of the questions smaller
    assert interval([one] * 3) == (0.5, pytest.approx(1.96 * 0.05))
    spread = [Score("target", "acc", v, 100, 0.0) for v in (0.4, 0.5, 0.6)]
    assert interval(spread) == (pytest.approx(0.5), pytest.approx(1.96 * (0.01 / 3) ** 0.5))


def test_table_markdown_and_picture(scored, tmp_path):
    comparison = run(tmp_path, [Contender("nudge", Nudge(noisy=True))])
    assert comparison.columns("metals") == ["target", "general", "ppl", "relearning"]
    lines = comparison.markdown("metals").splitlines()
    assert lines[2].startswith("| un-edited | 2 | 0.900 ± 0.098 |") and lines[3].startswith("| nudge | 2 | 0.400 ")
    assert "90" in lines[-1] and comparison.table("metals").row_count == 3
    comparison.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_comparison_reads_what_is_there_so_far():
    cell = Cell("metals", "x", 0, Report((Score("target", "acc", 0.4, 9, 0.1),)))
    assert Comparison((cell,)).rows("metals") == {"x": [cell]} and Comparison((cell,)).subjects == ["metals"]
