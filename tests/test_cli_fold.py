"""`conceptx fold`: from a saved edit and a model folder to a folder that plain libraries load."""

from pathlib import Path

import pytest
import torch
from hosts import tiny, tiny_pipeline
from typer.testing import CliRunner

from conceptx.cli import app, main
from conceptx.concept import Concept
from conceptx.edit import Edit, Rows
from conceptx.methods import UCE
from conceptx.models import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def fold(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["fold", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model, and an edit of two of its rows."""
    model = tiny("llama")
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    Edit(model.fingerprint, deltas={"lm_head.weight": Rows(torch.tensor([4, 7]), torch.ones(2, 32))}).save(
        tmp_path / "edit"
    )
    return tmp_path


def test_a_language_model(folder: Path) -> None:
    output = fold(folder / "model", "--edit", folder / "edit", "--out", folder / "out")
    assert "1 of 30 weights changed" in output and "MB written in" in output and "peak memory" in output
    before, after = (load(str(folder / name)).parameter("lm_head.weight") for name in ("model", "out"))
    assert before is not None and after is not None
    assert [n for n in range(320) if not torch.equal(before[n], after[n])] == [4, 7]


def test_a_pipeline(tmp_path: Path) -> None:
    model = tiny_pipeline("sd1")
    model.pipeline.save_pretrained(tmp_path / "pipe")
    UCE().erase(model, Concept("tin", kind="object", anchor="gold")).save(tmp_path / "edit")
    output = fold(tmp_path / "pipe", "--edit", tmp_path / "edit", "--out", tmp_path / "out")
    assert "8 of 244 weights changed" in output
    with Edit.load(tmp_path / "edit").fold(model).applied(model):
        wanted = model.generate(["tin"], seeds=[0], steps=2)
    assert torch.equal(load(str(tmp_path / "out")).generate(["tin"], seeds=[0], steps=2), wanted)


def test_what_cannot_be_done_is_one_sentence(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model" / "pytorch_model.bin").write_bytes(b"")
    arguments = ["fold", folder / "model", "--edit", folder / "edit", "--out", folder / "out"]
    monkeypatch.setattr("sys.argv", ["conceptx", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "would stay unedited; take it out of the folder." in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out").exists()


def test_help_says_what_it_takes_and_shows_examples() -> None:
    text = fold("--help")
    assert all(words in text for words in ("CHECKPOINT", "--edit", "--out", "conceptx fold models/sdxl"))
