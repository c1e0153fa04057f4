"""`Report`: scores with N, standard error or interval and, beside each, the score of the model without the edit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptx.store import write_atomically

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """One measured number.

    part:     which of the task's items: "all", or a part such as "seen" (members that occur in the forget corpus).
    error:    standard error of the value, None where it has none.
    n:        number of items.
    unedited: the same score of the model without the edit, None where it was not measured.
    chance:   what guessing gives, None where that has no meaning.
    low, high: limits of the 95 % interval, None where there is none.
    """

    task: str
    metric: str
    value: float
    n: int
    error: float | None = None
    part: str = "all"
    unedited: float | None = None
    chance: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.task, self.metric, self.part)


@dataclass(frozen=True)
class Report:
    """Scores of one model state, and how they were made."""

    scores: tuple[Score, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str | tuple[str, ...]) -> Score:
        """report["task"], report["task", "metric"] or report["task", "metric", "part"].

        Raises KeyError that names what was measured.
        """
        wanted = (key,) if isinstance(key, str) else key
        for score in self.scores:
            if score.key[: len(wanted)] == wanted:
                return score
        raise KeyError(f"Nothing was measured for {wanted}; measured: {sorted({s.task for s in self.scores})}.")

    def beside(self, unedited: Report) -> Report:
        """The same scores with those of the un-edited model beside them."""
        before = {score.key: score.value for score in unedited.scores}
        return replace(self, scores=tuple(replace(s, unedited=before.get(s.key)) for s in self.scores))

    def table(self, title: str = "") -> Table:
        """A table for the terminal: intervals where there are any, else standard errors and what guessing gives."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        intervals = any(s.low is not None for s in self.scores)
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("task", "metric"):
            table.add_column(column, overflow="fold")
        for column in ("N", "un-edited", "value", *(("95 %",) if intervals else ("± s.e.", "chance"))):
            table.add_column(column, justify="right", no_wrap=True)
        for s in self.scores:
            last = (_interval(s),) if intervals else tuple(map(_number, (s.error, s.chance)))
            numbers = (_number(s.unedited), _number(s.value), *last)
            table.add_row(s.task if s.part == "all" else f"  {s.part}", s.metric, str(s.n), *numbers)
        return table

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        content = {"scores": [asdict(s) for s in self.scores], "settings": dict(self.settings)}
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError when it is no report."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no report {path}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Report(tuple(Score(**score) for score in content["scores"]), content["settings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a report: {error}.") from None

    @staticmethod
    def joined(reports: Iterable[Report]) -> Report:
        """All scores in one report; settings of later reports win."""
        parts = list(reports)
        settings = {key: value for part in parts for key, value in part.settings.items()}
        return Report(tuple(score for part in parts for score in part.scores), settings)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(score: Score) -> str:
    """Its limits; a value with a standard error alone shows that."""
    if score.low is None:
        return "–" if score.error is None else f"± {_number(score.error)}"
    return f"{_number(score.low)} to {_number(score.high)}"
