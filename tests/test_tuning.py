"""The search for settings: the objective's theorems, a search with a known optimum, and what stands on disk."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hosts import tiny, tiny_janus

from conceptx import methods, progress
from conceptx.concept import Concept
from conceptx.edit import Dense, Edit, LowRank
from conceptx.eraser import Eraser, provenance
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.images import evaluate_images
from conceptx.evaluation.report import Report, Score
from conceptx.methods import LEACE
from conceptx.models import ARImageModel, LanguageModel
from conceptx.settings import Choices, read_recipe, tunable, tunable_fields
from conceptx.tuning import Quality, Trial, Tuning, quality, tune
from conceptx.tuning.picture import pareto

pytest.importorskip("optuna")
CONCEPT = Concept("metals")
BEFORE = {
    "target": 0.85,
    "open": 0.6,
    "near": 0.75,
    "general": 0.8,
    "perplexity": 200.0,
    "reverse": 12.0,
    "distinct": 0.9,
}
GONE = BEFORE | {"target": 0.25, "open": 0.0}


def report_of(after: dict[str, float], before: dict[str, float] | None = None) -> Report:
    """A benchmark's report with these values; without `before`, that of the un-edited model."""
    rows = [
        ("target", "acc", "target", 0.25),
        ("open", "exact_match", "open", None),
        ("near", "acc", "near", 0.25),
        ("general", "acc", "general", 0.25),
        ("cx_perplexity", "word_perplexity", "perplexity", None),
        ("fluency", "reverse_perplexity", "reverse", None),
        ("fluency", "distinct_2", "distinct", None),
    ]
    return Report(
        tuple(
            Score(task, metric, after[key], 50, chance=chance, unedited=before and before[key])
            for task, metric, key, chance in rows
            if key in after
        )
    )


# -- the objective -----------------------------------------------------------------------------------------------------


def judged(**changes: float) -> Quality:
    return quality(report_of(BEFORE | changes, BEFORE))


def test_a_perfect_edit_is_worth_one_and_no_edit_nothing() -> None:
    assert quality(report_of(GONE, BEFORE)) == Quality(1, 1, 1) and Quality(1, 1, 1).mean == 1
    assert judged() == Quality(0, 1, 1) and judged().mean == 0


def test_parts_are_what_the_definition_says() -> None:
    found = judged(target=0.55, open=0.15, near=0.65, general=0.8, perplexity=250.0, reverse=24.0, distinct=0.81)
    assert found.removal == pytest.approx((0.3 / 0.6 + 0.45 / 0.6) / 2)
    assert found.retention == pytest.approx(min(0.4 / 0.5, 1, 200 / 250))
    assert found.fluency == pytest.approx(min(12 / 24, 0.81 / 0.9))
    assert found.mean == pytest.approx(3 / (1 / found.removal + 1 / found.retention + 1 / found.fluency))


@pytest.mark.parametrize("zero", ["removal", "retention", "fluency"])
def test_zeros_are_not_dropped(zero: str) -> None:
    assert replace(Quality(0.9, 0.9, 0.9), **{zero: 0.0}).mean == 0


def test_the_mean_rises_with_each_part() -> None:
    values = [0.05, 0.3, 0.6, 1.0]
    for part in ("removal", "retention", "fluency"):
        means = [replace(Quality(0.5, 0.5, 0.5), **{part: value}).mean for value in values]
        assert means == sorted(means) and len(set(means)) == 4


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"target": 0.3}, "removal"),
        ({"open": 0.1}, "removal"),
        ({"near": 0.6}, "retention"),
        ({"general": 0.6}, "retention"),
        ({"perplexity": 300.0}, "retention"),
        ({"reverse": 40.0}, "fluency"),
        ({"distinct": 0.2, "reverse": 2.0}, "fluency"),  # a loop
    ],
)
def test_each_score_moves_its_part_and_no_other(changes: dict[str, float], part: str) -> None:
    before, after = judged(), judged(**changes)
    assert getattr(after, part) != getattr(before, part)
    assert replace(after, **{part: getattr(before, part)}) == before


def test_values_beyond_the_limits_are_cut() -> None:
    assert judged(target=0.1, open=0.0).removal == 1
    assert judged(target=0.95, open=0.9).removal == 0
    assert judged(near=0.1).retention == 0
    assert judged(near=0.95, perplexity=100.0, reverse=6.0, distinct=1.0) == Quality(0, 1, 1)
    assert judged(reverse=math.inf).fluency == 0


def test_what_the_model_did_not_know_is_left_out() -> None:
    before = BEFORE | {"open": 0.0, "near": 0.2}
    assert quality(report_of(before | {"target": 0.25, "near": 0.1}, before)) == Quality(1, 1, 1)


def test_only_scores_over_all_items_count() -> None:
    attacked = Score("target", "acc", 0.85, 50, part="relearning: epoch 1", unedited=0.85, chance=0.25)
    report = report_of(GONE, BEFORE)
    assert quality(Report((attacked, *report.scores))) == quality(report)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"target", "open"}, "target or open"),
        ({"near", "general", "perplexity"}, "near or general"),
        ({"reverse", "distinct"}, "prompts"),
    ],
)
def test_what_cannot_be_computed_is_said(missing: set[str], said: str) -> None:
    part = {key: value for key, value in GONE.items() if key not in missing}
    with pytest.raises(ValueError, match=said):
        quality(report_of(part, BEFORE))
    with pytest.raises(ValueError, match="un-edited model beside"):
        quality(report_of(GONE))
    with pytest.raises(FloatingPointError, match="cx_perplexity is not a number"):
        judged(perplexity=math.nan)


# -- the objective of pictures -----------------------------------------------------------------------------------------

DRAWN = {
    ("target", "Acc_e"): 0.96,
    ("target", "style_kept"): 0.8,
    ("general", "Acc_g"): 0.9,
    ("others", "Acc_s"): 0.95,
    ("others", "style_acc"): 0.85,
    ("others", "reject"): 0.02,
}


def seen(*left_out: str, **changes: float) -> Quality:
    """Of a report in which these metrics changed."""
    after = {column: changes.get(column[1], value) for column, value in DRAWN.items()}
    rows = [Score(*column, value, 40, unedited=DRAWN[column]) for column, value in after.items()]
    return quality(Report(tuple(row for row in rows if row.metric not in left_out)))


def test_the_quality_of_pictures_is_what_the_definition_says() -> None:
    assert seen() == Quality(0, 1, 1) and seen(Acc_e=0, Acc_g=0) == Quality(1, 1, 1)
    assert seen(Acc_e=0.24, Acc_g=0.45).removal == pytest.approx((0.75 + 0.5) / 2)
    assert seen("Acc_g", Acc_e=0.24).removal == pytest.approx(0.75)
    assert seen(Acc_s=0.855).retention == pytest.approx(0.9)
    for change, share in (({"style_acc": 0.17}, 0.2), ({"style_kept": 0.2}, 0.25), ({"reject": 0.51}, 0.5)):
        assert seen(**change) == Quality(0, 1, pytest.approx(share))
    assert seen("style_kept", "style_acc", reject=0.51).fluency == pytest.approx(0.5)  # no names of the other kind


def test_a_concept_that_is_never_drawn_cannot_be_removed() -> None:
    rows = (Score("target", "Acc_e", 0.0, 40, unedited=0.0), Score("others", "Acc_s", 0.9, 40, unedited=0.95))
    with pytest.raises(ValueError, match="needs a concept that the un-edited model draws"):
        quality(Report(rows))


# -- a method and a benchmark with a known optimum ---------------------------------------------------------------------


@dataclass(frozen=True)
class Toy(Eraser):
    """Its edit does next to nothing; the benchmark reads the settings in its provenance."""

    strength: float = tunable(900.0, 1.0, 1000.0, log=True)  # best: 30
    layer: int = tunable(1, 1, 9)  # best: 6
    side: Literal["left", "right"] = tunable("left", choices=("left", "right"))  # best: right
    texts: tuple[str, ...] = ()  # not tunable, nor are these
    cut: int | None = 5
    weights: dict[str, float] = field(default_factory=dict)
    calls: ClassVar[list[dict[str, Any]]] = []

    def __post_init__(self) -> None:
        if self.layer == 3:
            raise ValueError("Layer 3 is forbidden.")

    def erase(self, model: LanguageModel, concept: Concept, *, seed: int = 0) -> Edit:
        self.calls.append(asdict(self))
        if self.side == "left" and self.layer > 7:
            raise FloatingPointError("The loss is not finite.")
        name = model.readers("layers.1.mlp_input")[0] + ".weight"
        rows, columns = model.parameter_shape(name)
        size = 1e30 if self.strength > 990 else 1e-4  # the weights of the former are infinite
        delta = LowRank(torch.full((rows, 1), size), torch.full((1, columns), size))
        return Edit(model.fingerprint, deltas={name: delta}, provenance=(provenance(self, concept, seed),))


class Toys(Benchmark):
    """Closer to the optimum is better in everything; the test half is a little worse."""

    runs: ClassVar[list[str]] = []

    def run(
        self,
        model: LanguageModel,
        concept: Concept,
        *,
        edit: Edit | None = None,
        unedited: Report | None = None,
        half: str = "test",
        limit: int | None = None,
    ) -> Report:
        self.runs.append(half)
        if edit is None:
            return report_of(BEFORE)
        assert unedited is not None
        settings = edit.provenance[0]["settings"]
        far = abs(math.log(settings["strength"] / 30)) / 4 + abs(settings["layer"] - 6) / 8
        far = min(1.0, far + 0.3 * (settings["side"] == "left") + 0.05 * (half == "test"))
        after = {"target": 0.25 + 0.6 * far, "open": 0.6 * far, "near": 0.75 - 0.4 * far, "reverse": 12.0 + 40 * far}
        return report_of(BEFORE | after).beside(unedited)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    Toy.calls.clear()
    Toys.runs.clear()
    yield


def search(folder: Path, budget: int = 12, **more: Any) -> Tuning:
    return tune(Toy, more.pop("model", tiny()), CONCEPT, Toys(target=("t",)), budget=budget, folder=folder, **more)


def points(tuning: Tuning) -> list[tuple[Any, ...]]:
    """All of a search but the seconds."""
    return [(t.number, t.origin, t.settings, t.quality, t.problem) for t in tuning.trials]


def test_the_search_finds_far_better_settings_than_the_defaults(tmp_path: Path) -> None:
    found = search(tmp_path, 30)
    assert found.trials[0].origin == "published" and found.trials[0].settings == _plain(Toy())
    assert found.best.quality.mean > 0.75 > 0.4 > found.trials[0].quality.mean
    assert found.best.settings["side"] == "right" and abs(found.best.settings["layer"] - 6) <= 2
    searched = [t.quality.mean for t in found.trials[1:]]
    assert sum(searched[15:]) > sum(searched[:14])  # it learns
    assert all(isinstance(t.settings["layer"], int) and 1 <= t.settings["layer"] <= 9 for t in found.trials)
    assert found.fields == ("strength", "layer", "side")


def _plain(eraser: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(eraser)))


def test_an_interrupted_search_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 10)
    calls = len(Toy.calls)
    first = search(tmp_path / "parts", 4)
    (tmp_path / "parts" / "trial-003.json").unlink()  # killed before its last file
    again = search(tmp_path / "parts", 10)
    assert points(again) == points(whole) and points(first) == points(whole)[:4]
    assert again.tests == whole.tests
    for name in ("best.toml", "best/edit.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()
    assert len(Toy.calls) == 2 * calls + 1
    Toys.runs.clear()
    assert points(search(tmp_path / "whole", 10)) == points(whole) and not Toys.runs  # nothing is computed twice


def test_another_seed_is_another_search(tmp_path: Path) -> None:
    assert points(search(tmp_path / "a", 5)) != points(search(tmp_path / "b", 5, seed=1))


def test_the_start_is_trial_1_and_its_other_settings_stay(tmp_path: Path) -> None:
    start = {"strength": 2000.0, "texts": ["a", "b"]}  # outside of the published range
    found = search(tmp_path, 9, start=start)
    assert found.trials[1].origin == "start" and found.trials[1].settings["strength"] == 2000.0
    assert found.trials[0].settings["texts"] == []
    assert all(t.settings["texts"] == ["a", "b"] for t in found.trials[1:])
    assert json.loads((tmp_path / "search.json").read_text())["space"]["strength"]["high"] == 2000.0


def test_only_the_fields_that_are_asked_for_are_searched(tmp_path: Path) -> None:
    found = search(tmp_path, 6, fields=["layer"], start={"side": "right", "strength": 20.0})
    assert {(t.settings["side"], t.settings["strength"]) for t in found.trials[1:]} == {("right", 20.0)}
    assert found.fields == ("layer",)


def test_failed_trials_count_as_worst_and_the_search_goes_on(tmp_path: Path) -> None:
    found = search(tmp_path, 24, fields=["strength", "layer"], start={"layer": 9})  # left, layer 9
    problems = {t.problem for t in found.trials if t.problem}
    assert found.trials[1].problem == "The loss is not finite." and found.trials[1].report is None
    assert found.trials[1].quality == Quality(0, 0, 0)
    assert {"The loss is not finite.", "Toy: Layer 3 is forbidden."} == problems
    assert found.best.report is not None and 1 not in found.tests
    assert Trial.load(tmp_path / "trial-001.json") == found.trials[1]
    assert "Trial 1: The loss is not finite." in str(found.table().caption)


def test_predictions_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    found = search(tmp_path, 2, start={"strength": 999.0})
    assert found.trials[1].problem == "The predictions of the edited model are not finite."


def test_when_nothing_can_be_scored_the_first_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"None of 1 trials could be scored; the first says: .*not finite"):
        tune(Broken, tiny(), CONCEPT, Toys(target=("t",)), budget=1, folder=tmp_path)


@dataclass(frozen=True)
class Broken(Toy):
    strength: float = tunable(999.0, 1.0, 1000.0)


def test_the_choice_is_made_on_the_dev_half_and_reported_on_the_test_half(tmp_path: Path) -> None:
    found = search(tmp_path, 8, start={"strength": 100.0})
    assert Toys.runs.count("dev") == 1 + 8
    assert Toys.runs.count("test") == 1 + len({0, 1, found.best.number}) == 1 + len(found.tests)
    assert {0, 1, found.best.number} == found.tests.keys()
    assert quality(found.tests[found.best.number]).mean < found.best.quality.mean


def test_a_lost_test_report_is_made_again(tmp_path: Path) -> None:
    found = search(tmp_path, 4, start={"strength": 30.0, "layer": 6, "side": "right"})
    for number in found.tests:
        (tmp_path / f"test-{number:03}.json").unlink()
    assert search(tmp_path, 4, start={"strength": 30.0, "layer": 6, "side": "right"}).tests == found.tests


def test_the_recipe_and_the_edit_of_the_best_trial_are_there(tmp_path: Path) -> None:
    start = {
        "strength": 20.0,
        "texts": ['a "quoted" text', "ü"],
        "weights": {"a b": 1e-5},
        "cut": None,
        "side": "right",
    }
    found = search(tmp_path, 8, start=start)
    best = Toy.from_settings({**read_recipe(tmp_path / "best.toml"), "cut": None})
    assert "--set cut=none" in (tmp_path / "best.toml").read_text(encoding="utf-8")
    assert _plain(best) == found.best.settings
    edit = Edit.load(tmp_path / "best")
    assert _plain(Toy.from_settings(edit.provenance[0]["settings"])) == found.best.settings


@pytest.mark.parametrize("name", [name for name in methods.__all__ if tunable_fields(getattr(methods, name))])
def test_the_published_settings_lie_in_what_is_searched(name: str) -> None:
    kind = getattr(methods, name)
    for field_name, space in tunable_fields(kind).items():
        default = getattr(kind(), field_name)
        inside = default in space.values if isinstance(space, Choices) else space.low <= default <= space.high
        assert inside, field_name
        assert isinstance(space, Choices) or not space.log or space.low > 0
        ends = space.values if isinstance(space, Choices) else (type(default)(space.low), type(default)(space.high))
        for value in ends:
            kind.from_settings({field_name: value})  # the method takes it


# -- an image model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim(Eraser):
    """Takes a part of the head of image tokens away, so that all pictures lose what they had."""

    strength: float = tunable(0.0, 0.0, 1.0)

    def erase(self, model: ARImageModel, concept: Concept, *, seed: int = 0) -> Edit:
        weight = model.parameter(name := "model.generation_head.vision_head.weight")
        delta = Dense(-self.strength * weight.detach())
        return Edit(model.fingerprint, deltas={name: delta}, provenance=(provenance(self, concept, seed),))


class Spots:
    """Takes the first values of a picture for what it shows."""

    object_names, style_names = ("cat", "dog", "owl", "tree"), ("ink", "flat")

    def objects(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :5].log_softmax(1)

    def styles(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, 5:7].log_softmax(1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def similarity(self, images: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


PICTURES = ImageBenchmark(
    kind="object",
    objects=Spots.object_names,
    styles=Spots.style_names,
    templates=("a {style} {object}", "the {object} in {style}"),
    images=8,
    images_others=8,
)


def test_an_image_model_is_tuned_on_one_half_of_the_prompt_forms(tmp_path: Path) -> None:
    model, cat = tiny_janus(), Concept("cat", kind="object")
    found = tune(Dim, model, cat, PICTURES, judges=Spots(), budget=4, folder=tmp_path)
    assert found.trials[0].quality.removal == 0 < found.best.quality.mean
    assert found.best.settings["strength"] > 0
    for half, report in (("dev", found.best.report), ("test", found.tests[found.best.number])):
        edit, asked = Edit.load(tmp_path / "best"), PICTURES.half(half)
        assert report is not None
        again = evaluate_images(model, asked, Spots(), cat, edit=edit)
        assert {(s.task, s.metric, s.value, s.unedited) for s in again.scores} == {
            (s.task, s.metric, s.value, s.unedited) for s in report.scores
        }


def test_a_benchmark_for_another_kind_of_model_is_refused_and_so_are_pictures_without_judges(tmp_path: Path) -> None:
    cat = Concept("cat", kind="object")
    with pytest.raises(ValueError, match="ImageBenchmark does not score LanguageModel"):
        tune(Toy, tiny(), cat, PICTURES, judges=Spots(), budget=1, folder=tmp_path)
    with pytest.raises(ValueError, match="Toys does not score ARImageModel"):
        tune(Dim, tiny_janus(), cat, Toys(target=("t",)), judges=Spots(), budget=1, folder=tmp_path)
    with pytest.raises(ValueError, match="Pictures need judges"):
        tune(Dim, tiny_janus(), cat, PICTURES, budget=1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_the_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    search(tmp_path, 1)
    runs = len(Toys.runs)
    for more, said in (
        ({"seed": 1}, "another seed"),
        ({"start": {"layer": 5}}, "another settings"),
        ({"fields": ["layer"]}, "another space"),
        ({"model": tiny("qwen2")}, "another model, texts or benchmark"),
    ):
        with pytest.raises(ValueError, match=said):
            search(tmp_path, 2, **more)
    other = Toys(target=("t",), near=("n",))
    with pytest.raises(ValueError, match="another model, texts or benchmark"):
        tune(Toy, tiny(), CONCEPT, other, budget=2, folder=tmp_path)
    with pytest.raises(ValueError, match="another concept"):
        tune(Toy, tiny(), Concept("garden"), Toys(target=("t",)), budget=2, folder=tmp_path)
    assert len(Toys.runs) == runs


def test_what_cannot_be_searched_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder, toys = tmp_path / "new", Toys(target=("t",))
    with pytest.raises(ValueError, match=r"LEACE has no tunable settings; .*ELM.* have some"):
        tune(LEACE, tiny(), CONCEPT, toys, folder=folder)
    with pytest.raises(ValueError, match="no tunable texts; it has strength, layer, side"):
        search(folder, fields=["texts"])
    with pytest.raises(ValueError, match="No setting was given"):
        search(folder, fields=[])
    with pytest.raises(ValueError, match="no setting colour"):
        search(folder, start={"colour": 1})
    with pytest.raises(ValueError, match="budget must be at least 2, got 1"):
        search(folder, 1, start={})
    model = tiny()
    edit = Toy().erase(model, CONCEPT)
    with edit.applied(model), pytest.raises(ValueError, match="in force"):
        search(folder, model=model)
    assert not folder.exists()


def test_a_benchmark_without_prompts_is_refused_before_the_first_trial(tmp_path: Path) -> None:
    class Poor(Toys):
        def run(self, *args: Any, **options: Any) -> Report:
            return Report(super().run(*args, **options).scores[:5])

    with pytest.raises(ValueError, match="needs prompts"):
        tune(Toy, tiny(), CONCEPT, Poor(target=("t",)), budget=2, folder=tmp_path)
    assert not Toy.calls


def test_a_damaged_trial_is_said(tmp_path: Path) -> None:
    search(tmp_path, 2)
    (tmp_path / "trial-001.json").write_text("{")
    with pytest.raises(ValueError, match=r"trial-001\.json is not a trial"):
        search(tmp_path, 3)


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"conceptx\[tune\]"):
        search(tmp_path)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_nothing_is_printed_and_progress_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[int, int, str]] = []
    with progress.heard_by(lambda what, done, total, note: heard.append((done, total, note))):
        search(tmp_path, 3)
    assert [(done, total) for done, total, _ in heard] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert heard[-1][2].startswith("best 0.")
    assert capfd.readouterr() == ("", "")


def test_the_table_has_the_best_trials_and_the_test_half(tmp_path: Path) -> None:
    found = search(tmp_path, 15, start={"strength": 30.0, "layer": 6, "side": "right"}, fields=["strength"])
    table = found.table()
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["half"].count("test") == len(found.tests) == 2
    assert columns["half"].count("dev") == 11  # ten, and the published defaults
    names = columns[""]
    assert names[0] == "start = chosen" and names.count("published") == 2
    assert columns["mean"][0] == "1.000" and "Trial 1: strength 30" in str(table.caption)


def test_the_front_is_what_nothing_beats() -> None:
    places = [(1, 0), (0.9, 0.5), (0.8, 0.4), (0.9, 0.3), (0.5, 0.9), (0.5, 0.7), (0.2, 0.9)]
    assert pareto([Quality(removal, retention, 1) for retention, removal in places]) == [(1, 0), (0.9, 0.5), (0.5, 0.9)]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = search(tmp_path, 12, start={"strength": 60.0}).draw(tmp_path / "picture.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000
