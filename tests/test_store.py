"""A folder that holds anything else is not replaced (tests/edit/test_files.py holds the rest of it)."""

from pathlib import Path

import pytest

from conceptx.store import replaced_folder


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"),
        replaced_folder(tmp_path / "mine") as new,
    ):
        (new / "model.json").write_text("{}")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.tex"]
