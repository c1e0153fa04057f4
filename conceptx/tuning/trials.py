"""The points of a search, on disk and in a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conceptx.evaluation.report import Report, Score
from conceptx.store import write_atomically
from conceptx.tuning.objective import Quality, quality

if TYPE_CHECKING:
    from rich.table import Table

Origin = Literal["published", "start", "search"]
SHOWN = 10  # trials in the table, beside those that have a name


@dataclass(frozen=True)
class Trial:
    """One point of the search.

    origin:  "published" (the defaults of the method), "start" (a recipe) or "search".
    seconds: for the edit and its scores.
    report:  the scores on the dev half; None when there are none, because of the `problem`.
    """

    number: int
    origin: Origin
    settings: Mapping[str, Any]
    seconds: float = 0.0
    report: Report | None = None
    problem: str | None = None

    @cached_property
    def quality(self) -> Quality:
        """On the dev half; zeros where there is no report."""
        return Quality(0.0, 0.0, 0.0) if self.report is None else quality(self.report)

    def save(self, path: Path) -> None:
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        write_json(path, {**content, "report": self.report and dataclasses.asdict(self.report)})

    @staticmethod
    def load(path: Path) -> Trial:
        """Raises ValueError when the file is no trial."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (found := content["report"]) is not None:
                content["report"] = Report(tuple(Score(**score) for score in found["scores"]), found["settings"])
            return Trial(**content)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a trial: {error}.") from None


def best_of(trials: Sequence[Trial]) -> Trial:
    """The one with the highest harmonic mean on the dev half; the earliest of several."""
    return max(trials, key=lambda trial: (trial.quality.mean, -trial.number))


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    fields: the settings that were varied.
    tests:  reports on the test half, by number of the trial: of the published defaults, the start, and the best.
    """

    method: str
    fields: tuple[str, ...]
    trials: tuple[Trial, ...]
    tests: Mapping[int, Report]

    @property
    def best(self) -> Trial:
        """The trial with the highest harmonic mean on the dev half; the earliest of several."""
        return best_of(self.trials)

    def name(self, trial: Trial) -> str:
        """What it is called: "published", "start", "chosen", two of them, or nothing."""
        own = "" if trial.origin == "search" else trial.origin
        return " = ".join(filter(None, (own, "chosen" if trial is self.best else "")))

    def table(self) -> Table:
        """The best trials on the dev half, then the test half; below, their settings, and failures."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=f"{self.method}, {len(self.trials)} trials", title_justify="left", box=SIMPLE_HEAD)
        for column in ("half", "trial", "removal", "retention", "fluency", "mean", "seconds"):
            table.add_column(column, justify="left" if column == "half" else "right")
        table.add_column("")
        for trial in self._shown():
            table.add_row("dev", *self._row(trial, trial.quality, f"{trial.seconds:.0f}"))
        table.add_section()
        for number, report in sorted(self.tests.items()):
            table.add_row("test", *self._row(self.trials[number], quality(report), ""))
        lines = [f"Trial {t.number}: {self._settings(t)}" for t in self._shown()]
        lines += [f"Trial {t.number}: {t.problem}" for t in self.trials if t.problem]
        table.caption, table.caption_justify = "\n".join(lines) or None, "left"
        return table

    def _settings(self, trial: Trial) -> str:
        return ", ".join(f"{name} {_short(trial.settings[name])}" for name in self.fields)

    def _shown(self) -> list[Trial]:
        """The best ones and those that have a name, the highest mean first."""
        ordered = sorted(self.trials, key=lambda trial: (-trial.quality.mean, trial.number))
        return [trial for place, trial in enumerate(ordered) if place < SHOWN or self.name(trial)]

    def _row(self, trial: Trial, found: Quality, seconds: str) -> list[str]:
        numbers = [f"{value:.3f}" for value in (found.removal, found.retention, found.fluency, found.mean)]
        return [str(trial.number), *numbers, seconds, self.name(trial)]

    def draw(self, path: str | Path) -> Path:
        """A picture (PNG) of the trade-off between retention and removal; returns its path.

        Raises ImportError when matplotlib (the extra `plots`) is missing.
        """
        from conceptx.tuning.picture import draw

        return draw(self, Path(path))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
