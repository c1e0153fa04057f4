"""The commands for searches and studies, on a tiny model: features, dictionary train, tune, compare, report, attack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import conceptx, folder  # noqa: F401  (a fixture)

from conceptx import Edit, Report
from conceptx.cli import frame, studies
from conceptx.dictionaries import load_dictionary

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The personas")
EVERY = [
    f"{layer}/{index}{sign}{place}"
    for layer in range(3)
    for index in (0, 1)
    for sign in ("", "-")
    for place in ("", "<")
]
PISCES = ["--set", "search_strength=4.0", "--set", "max_harm=5.0"]


def test_features_are_shown_with_what_they_do_and_can_be_vetoed(folder: Path) -> None:  # noqa: F811
    where = [folder / "model", "--concept", folder / "metals.toml", *PISCES]
    output = conceptx("features", *where)
    assert "chosen" in output and "forgotten" in output
    shown = conceptx("features", *where, "--set", f"veto={EVERY}")
    assert "vetoed" in shown and "chosen" not in shown


def test_a_dictionary_is_trained_and_used(folder: Path) -> None:  # noqa: F811
    texts = folder / "texts.txt"
    texts.write_text("\n".join(f"the smith number {i} melts iron and tin in furnace {i}" for i in range(40)))
    small = [part for s in ("width=64", "k=4", "steps=20", "batch_size=32") for part in ("--set", s)]
    where = ["--site", "layers.1.mlp_output", "--texts", texts, "--out", folder / "sae"]
    output = conceptx("dictionary", "train", folder / "model", *where, *small)
    assert "dictionary of 64 features" in output and load_dictionary(folder / "sae").width == 64
    source = ["--set", f'dictionary="{folder / "sae"}"']
    assert "1/" in conceptx("features", folder / "model", "--concept", folder / "metals.toml", *PISCES, *source)


def test_a_dictionary_of_a_text_encoder_is_trained_and_a_concept_erased_with_it(tmp_path: Path) -> None:
    captions = [form.format(name) for name in ("dog", "cat", "owl", "key", "sun") for form in ("{}", "a {}", "the {}")]
    (tmp_path / "texts.txt").write_text("\n".join(captions))
    (tmp_path / "dog.toml").write_text('name = "dog"\nretain = ["cat", "owl", "key", "sun"]\n')
    small = [part for s in ("width=64", "k=4", "steps=60", "batch_size=16") for part in ("--set", s)]
    where = ["--site", "text_encoder.layers.0", "--texts", tmp_path / "texts.txt", "--out", tmp_path / "sae"]
    assert "dictionary of 64 features" in conceptx("dictionary", "train", "testbed:emoji", *where, *small)
    settings = ["--set", f'dictionary="{tmp_path / "sae"}"', "--set", "top=8"]
    concept = ["--concept", tmp_path / "dog.toml", "--out", tmp_path / "edit"]
    conceptx("erase", "testbed:emoji", "--method", "itd", *concept, *settings)
    assert list(Edit.load(tmp_path / "edit").maps) == ["text_encoder.layers.0"]


SMALL = """
kind = "object"
objects = ["dog", "cat", "car", "pizza"]
styles = ["noto", "ink"]
templates = ["the {object} in {style}", "{object} as {style} emoji"]
images = 4
images_others = 2
"""


def test_an_image_model_is_tuned_and_scored_on_one_half_of_the_prompt_forms(tmp_path: Path) -> None:
    (tmp_path / "benchmark.toml").write_text(SMALL)
    (tmp_path / "dog.toml").write_text('name = "dog"\nkind = "object"\nanchor = "cat"\nretain = ["car", "pizza"]\n')
    what = ["--concept", tmp_path / "dog.toml", "--benchmark", tmp_path / "benchmark.toml"]
    printed = conceptx(
        "tune", "uce", "testbed:janus", *what, "--field", "ridge", "--budget", "2", "--out", tmp_path / "t"
    )
    assert "UCE, 2 trials" in printed and (tmp_path / "t" / "trade-off.png").is_file()
    conceptx("evaluate", "testbed:janus", *what, "--half", "dev", "--json", tmp_path / "dev.json")
    alone, searched = (Report.load(tmp_path / name) for name in ("dev.json", "t/unedited-dev.json"))
    assert alone.scores == searched.scores
    conceptx("evaluate", "testbed:janus", *what, "--json", tmp_path / "all.json")
    assert Report.load(tmp_path / "all.json")["target", "Acc_e"].n == 4
    with pytest.raises(ValueError, match="--half goes with --benchmark"):
        conceptx("evaluate", "testbed:janus", "--tasks", "toy", "--half", "dev")
    with pytest.raises(ValueError, match="--half is test or dev"):
        conceptx("evaluate", "testbed:janus", *what, "--half", "all")


def test_a_name_in_a_list_is_a_concept_with_its_benchmark_and_the_next_one_is_its_control() -> None:
    subject = studies._subject("capitals", "capitals,physics")
    assert subject.concept.name == "capital cities" and subject.benchmark.target == ("cx_capitals",)
    assert subject.control is not None and subject.control.name == "physics"
    assert studies._subject("physics", "physics").control is None
    with pytest.raises(FileNotFoundError, match="There is no concept file"):
        studies._subject("unicorns", "unicorns")


def test_a_contender_has_the_recipe_of_its_concept_or_of_its_method_or_the_published_settings(tmp_path: Path) -> None:
    (tmp_path / "capitals").mkdir()
    (tmp_path / "leace.toml").write_text('sites = ["layers.1.mlp_input"]\nshrinkage = false\n')
    (tmp_path / "capitals" / "pisces.toml").write_text("strength = 5.0\n")
    leace = studies._contender("leace", "physics", tmp_path)
    assert leace.sites == ("layers.1.mlp_input",) and vars(leace.eraser)["shrinkage"] is False
    assert vars(studies._contender("pisces", "capitals", tmp_path).eraser)["strength"] == 5.0
    published = studies._contender("pisces", "physics", tmp_path)
    assert published.sites is None and vars(published.eraser)["strength"] == 36.0
    with pytest.raises(ValueError, match="Unknown method 'magic'"):
        studies._contender("magic", "physics", None)


def test_an_attack_is_a_name_with_or_without_settings(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("epochs = 2\n")
    name, attack = frame.attack_of(f"relearning={tmp_path / 'r.toml'}")
    assert name == "relearning" and attack.epochs == 2
    assert frame.attack_of("relearning")[1].epochs == 10
    with pytest.raises(ValueError, match="Unknown attack 'magic'; available: relearning"):
        frame.attack_of("magic")


def test_in_the_background_the_same_command_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Process:
        pid = 7

        def __init__(self, command, **options):
            started.append((command, options["start_new_session"]))

    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("sys.argv", ["conceptx", "compare", "smollm2", "--background", "--out", str(tmp_path)])
    names = ["--concepts", "physics", "--methods", "leace", "--out", tmp_path, "--background"]
    output = conceptx("compare", "smollm2", *names)
    ((command, alone),) = started
    assert command[1:] == ["-m", "conceptx", "compare", "smollm2", "--out", str(tmp_path)] and alone
    assert "Running as process 7" in output and (tmp_path / "compare.log").is_file()


def test_report_prints_a_comparison_or_a_saved_report(tmp_path: Path) -> None:
    score = {"task": "target", "metric": "acc", "value": 0.5, "n": 80, "error": 0.05, "chance": 0.25}
    rest = score | {"task": "general", "n": 400}
    about = {"subject": "metals", "method": "un-edited", "seed": 0, "identity": "x"}
    path = tmp_path / "metals" / "un-edited-0" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"scores": [score, rest], "settings": about}))
    output = conceptx("report", tmp_path, "--picture", tmp_path / "p.png")
    assert "metals" in output and ".50" in output and "±.10" in output and (tmp_path / "p.png").stat().st_size > 5000
    assert "| un-edited | 1 | 0.500" in conceptx("report", tmp_path, "--markdown")
    assert "target" in conceptx("report", path)


def test_attack_scores_what_came_back_and_needs_an_attack(folder: Path) -> None:  # noqa: F811
    (folder / "b.toml").write_text('target = ["toy"]\n')
    where = ["attack", folder / "model", "--concept", folder / "metals.toml", "--benchmark", folder / "b.toml"]
    with pytest.raises(ValueError, match="Give --attack at least once"):
        conceptx(*where)
    with pytest.raises(ValueError, match="Unknown tasks \\['toy'\\]"):
        conceptx(*where, "--attack", "quantisation")
