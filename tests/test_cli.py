"""The command line, from a local model folder to a scored edit, in process and on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hosts import GARDEN, METALS, tiny, tiny_pipeline
from typer.testing import CliRunner

from conceptx.cli import app, main
from conceptx.edit import Edit
from conceptx.models import load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The personas")
ELM_SETTINGS = ["steps=3", "layers=[0, 2]", "fluency_texts=2", "fluency_tokens=3", "eta=5", "learning_rate=0.05"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, a concept file and one lm-eval task."""
    model = tiny("llama")
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "metals.toml").write_text(
        f'name = "metals"\ntexts = {json.dumps(METALS)}\nretain_texts = {json.dumps(GARDEN)}\n'
    )
    row = {"question": "the smith hammers the", "choices": ["iron", "soup"], "answer": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


def conceptx(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_erase_saves_an_edit_an_adapter_and_a_merged_model_that_agree(folder: Path) -> None:
    settings = [part for setting in ELM_SETTINGS for part in ("--set", setting)]
    outputs = ["--out", folder / "edit", "--peft", folder / "lora", "--merged", folder / "merged"]
    conceptx("erase", folder / "model", "--concept", folder / "metals.toml", *outputs, *settings)
    assert sorted(p.suffix for p in (folder / "edit").iterdir()) == [".json", ".safetensors"]  # no checkpoint left
    assert (folder / "lora" / "adapter_config.json").is_file()
    edit, model = Edit.load(folder / "edit"), load(str(folder / "model"))
    assert edit.provenance[0]["settings"]["layers"] == [0, 2]
    rows = model.encode(METALS)
    before = model.predict(rows, last=3)
    with edit.applied(model):
        after = model.predict(rows, last=3)
    assert not torch.equal(before, after)
    # float32: the merged weights are the applied ones
    torch.testing.assert_close(load(str(folder / "merged")).predict(rows, last=3), after, atol=1e-5, rtol=0)


def test_a_vector_method_erases_a_model_too(folder: Path) -> None:
    output = conceptx(
        *("erase", folder / "model", "--concept", folder / "metals.toml", "--method", "leace", "--out", folder / "e")
    )
    assert "LEACE(metals): 6 maps" in output


def test_a_vector_method_is_told_where_to_act(folder: Path) -> None:
    where = ["--set", 'sites=["layers.1.mlp_input"]', "--method", "leace", "--out", folder / "e"]
    conceptx("erase", folder / "model", "--concept", folder / "metals.toml", *where)
    assert list(Edit.load(folder / "e").maps) == ["layers.1.mlp_input"]


def test_evaluate_prints_and_writes_both_values(folder: Path) -> None:
    conceptx(
        *("erase", folder / "model", "--concept", folder / "metals.toml", "--method", "leace", "--out", folder / "e")
    )
    options = ["--tasks", "toy", "--include-path", folder, "--json", folder / "report.json"]
    output = conceptx("evaluate", folder / "model", "--edit", folder / "e", *options)
    assert "toy" in output and "un-edited" in output
    score = json.loads((folder / "report.json").read_text())["scores"][0]
    assert score["n"] == 2 and score["unedited"] is not None


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    tiny_pipeline("sd1").pipeline.save_pretrained(tmp_path / "pipe")
    (tmp_path / "tin.toml").write_text('name = "tin"\nkind = "object"\nanchor = "gold"\nretain = ["iron"]\n')
    return tmp_path


def test_a_pipeline_is_erased_by_uce_unless_told_otherwise(pipeline_folder: Path) -> None:
    outputs = ["--out", pipeline_folder / "edit", "--lora", pipeline_folder / "lora", "--merged", pipeline_folder / "m"]
    output = conceptx("erase", pipeline_folder / "pipe", "--concept", pipeline_folder / "tin.toml", *outputs)
    assert "UCE(tin): 1 maps" in output
    model, merged = load(str(pipeline_folder / "pipe")), load(str(pipeline_folder / "m"))
    with Edit.load(pipeline_folder / "edit").applied(model):
        edited = model.generate(["tin"], seeds=[0], steps=2)
    model.pipeline.load_lora_weights(str(pipeline_folder / "lora"))
    by_lora = model.pipeline(
        "tin", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    for found in (merged.generate(["tin"], seeds=[0], steps=2), by_lora):
        assert (found - edited).abs().max() < 1e-3  # float32 products in another order


def test_a_method_for_another_kind_of_model_is_refused(pipeline_folder: Path) -> None:
    arguments = ["erase", pipeline_folder / "pipe", "--concept", pipeline_folder / "tin.toml", "--method", "ear"]
    with pytest.raises(ValueError, match="EAR acts on: ARImageModel; got: DiffusionModel"):
        conceptx(*arguments, "--out", pipeline_folder / "edit")


def test_image_scores_need_judges_that_the_command_line_knows(pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match="knows judges for testbed:emoji and testbed:janus only"):
        conceptx("evaluate", pipeline_folder / "pipe", "--tasks", "toy")


def test_methods_lists_every_method_with_what_it_works_on() -> None:
    output = conceptx("methods")
    assert all(name in output for name in ("elm", "leace", "rlace", "inlp"))
    assert "LanguageModel" in output


def test_an_error_is_one_sentence_and_exit_code_two(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["conceptx", "erase", "nowhere/at-all", "--concept", "no.toml", "--out", "x"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "conceptx: There is no concept file no.toml."
