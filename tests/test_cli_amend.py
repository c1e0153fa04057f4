"""`conceptx erase --ledger` and `conceptx amend`: concepts come and go in a folder, and names are told what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hosts import tiny, tiny_pipeline
from typer.testing import CliRunner

from conceptx import Concept, Edit
from conceptx.cli import app
from conceptx.methods import UCE
from conceptx.models import load

CONCEPTS = {
    "tin": 'name = "tin"\nkind = "object"\nanchor = "gold"\nretain = ["iron", "bread"]\n',
    "cat": 'name = "cat"\nkind = "object"\nretain = ["bird", "iron"]\n',
    "iron": 'name = "iron"\nanchor = "gold"\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline("sd1").pipeline.save_pretrained(tmp_path / "pipe")
    for name, text in CONCEPTS.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


def conceptx(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def erase(folder: Path, *more: object) -> str:
    return conceptx("erase", folder / "pipe", "--concept", folder / "tin.toml", "--out", folder / "edit", *more)


def matrix(edit: Edit) -> torch.Tensor:
    (found,) = edit.maps["text"]
    return found.write @ found.read


def test_a_concept_is_added_and_another_taken_out(folder: Path) -> None:
    output = erase(folder, "--ledger", "--seed", 3)
    assert "ledger.json: the ledger" in output
    assert Edit.load(folder / "edit").provenance[0]["seed"] == 3
    model = load(str(folder / "pipe"))
    tin, cat = (Concept.load(folder / f"{name}.toml") for name in ("tin", "cat"))
    call = ["amend", folder / "edit", "--model", folder / "pipe", "--add", folder / "cat.toml"]
    assert "UCE(tin, cat): 1 maps" in conceptx(*call)
    # float32 rows that were encoded beside others
    expected = matrix(UCE().erase(model, [tin, cat]))
    torch.testing.assert_close(matrix(Edit.load(folder / "edit")), expected, rtol=0, atol=1e-3)
    output = conceptx("amend", folder / "edit", "--remove", "tin")
    assert "UCE(cat): 1 maps" in output and "algebra" not in output  # without a model there is nothing to encode
    torch.testing.assert_close(matrix(Edit.load(folder / "edit")), matrix(UCE().erase(model, cat)), rtol=0, atol=1e-3)
    assert {path.name.partition("-")[0] for path in (folder / "edit").iterdir()} == {
        "edit", "edit.json", "ledger", "ledger.json"
    }  # fmt: skip


def test_what_is_removed_goes_first_so_that_the_only_concept_can_be_replaced(folder: Path) -> None:
    erase(folder, "--ledger")
    call = ["amend", folder / "edit", "--model", folder / "pipe", "--add", folder / "iron.toml", "--remove", "tin"]
    assert "UCE(iron): 1 maps" in conceptx(*call)  # tin retained it


def test_names_are_told_after_erasing_and_amending(folder: Path) -> None:
    output = erase(folder, "--ledger")
    assert "tin to gold" in output and "retained, mean of 3" in output and "Not covered" not in output
    output = conceptx("amend", folder / "edit", "--model", folder / "pipe", "--add", folder / "cat.toml")
    assert "cat to the empty prompt" in output and "retained, mean of 4" in output


def test_what_the_algebra_does_not_cover_is_said(folder: Path) -> None:
    settings = ["--method", "esd", "--set", "steps=1", "--set", "variant=u"]
    output = erase(folder, *settings)
    assert "tin to gold" in output and "Not covered: changes of" in output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model", "pipe"], "Nothing was asked for; give --add or --remove"),
        (["--add", "cat.toml"], "--add needs --model, to encode the concept"),
        (["--add", "iron.toml", "--model", "pipe"], "retained as well: iron"),
        (["--remove", "tin"], "The ledger holds no concept"),
        (["--add", "cat.toml", "--model", "llama"], "UCE acts on: DiffusionModel or ARImageModel; got: LanguageModel"),
    ],
)
def test_what_cannot_be_amended_leaves_the_folder_as_it_was(folder: Path, arguments: list[str], message: str) -> None:
    model = tiny("llama")
    model.module.save_pretrained(folder / "llama")
    model.tokenizer.save_pretrained(folder / "llama")
    erase(folder, "--ledger")
    before = {path: path.read_bytes() for path in (folder / "edit").iterdir()}
    paths = [a if a.startswith("--") or a == "tin" else str(folder / a) for a in arguments]
    with pytest.raises(ValueError, match=message):
        conceptx("amend", folder / "edit", *paths)
    assert before == {path: path.read_bytes() for path in (folder / "edit").iterdir()}


def test_an_edit_without_a_ledger_cannot_be_amended(folder: Path) -> None:
    erase(folder)
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        conceptx("amend", folder / "edit", "--remove", "tin")
    with pytest.raises(ValueError, match="Only UCE keeps a ledger, not ESD"):
        erase(folder, "--ledger", "--method", "esd")
