"""Methods against each other: one model, several concepts and seeds, one table and one picture.

Every cell is written when it is done, so a comparison that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import TYPE_CHECKING, Any

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, run_identity
from conceptx.evaluation.attacked import attacked, goal_of
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel
from conceptx.progress import track
from conceptx.store import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

    from conceptx.attacks.attack import Goal, LanguageAttack

UNEDITED = "un-edited"
ROLES = ("target", "open", "near", "general")
COLUMNS = {"word_perplexity": "ppl", "reverse_perplexity": "reverse ppl"}  # metric -> column
ALWAYS = {*ROLES, *COLUMNS.values()}
CONTROL = ", control"  # behind the name of an attack that had texts of another concept
DONE, FAILED = "report.json", "failed.json"


@dataclass(frozen=True)
class Subject:
    """A concept with the benchmark that measures it, and what an attacker knows of another one, for the control."""

    concept: Concept
    benchmark: Benchmark
    control: Goal | None = None


@dataclass(frozen=True)
class Contender:
    """A method with its settings, under the name that the table gives it.

    sites: where a method on vectors acts; None: at all foldable sites.
    """

    name: str
    eraser: Eraser
    sites: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One method on one concept with one seed. failed: the sentence with which it ended, if it did."""

    subject: str
    method: str
    seed: int
    report: Report
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """All cells that are done.

    attack columns are the highest accuracy on the target that any stage of the attack reaches.
    """

    cells: tuple[Cell, ...]

    @staticmethod
    def load(folder: str | Path) -> Comparison:
        """What `compare` has written so far. Raises FileNotFoundError when there is nothing."""
        paths = sorted(Path(folder).glob(f"*/*/{DONE}")) + sorted(Path(folder).glob(f"*/*/{FAILED}"))
        if not paths:
            raise FileNotFoundError(f"{folder} holds no cell of a comparison.")
        return Comparison(tuple(map(_load, paths)))

    @property
    def subjects(self) -> list[str]:
        return sorted({cell.subject for cell in self.cells})

    def rows(self, subject: str) -> dict[str, list[Cell]]:
        """The cells of a concept by method, the un-edited model first."""
        mine = [cell for cell in self.cells if cell.subject == subject]
        names = sorted({cell.method for cell in mine}, key=lambda name: (name != UNEDITED, name))
        return {name: [cell for cell in mine if cell.method == name] for name in names}

    def columns(self, subject: str) -> list[str]:
        """What was measured of a concept in any cell: roles, perplexity, fluency, and each attack."""
        found = {name for cell in self.cells if cell.subject == subject for name in values(cell.report)}
        return [*(name for name in (*ROLES, *COLUMNS.values()) if name in found), *sorted(found - ALWAYS)]

    def table(self, subject: str) -> Table:
        """Mean over the seeds and half the width of its 95 % interval, a row for each method; without the controls."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        rows, columns = self.rows(subject), [c for c in self.columns(subject) if not c.endswith(CONTROL)]
        table = Table(title=subject, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("method", no_wrap=True)
        for column in ("seeds", *columns):
            table.add_column(column, justify="right", overflow="fold")
        for name, cells in rows.items():
            table.add_row(
                name,
                str(len(cells)),
                *(text.replace(" ± ", "\n±").replace("0.", ".") for text in _texts(cells, columns, 2)),
            )
        table.add_row("N", "", *(_count(rows, column) for column in columns), style="dim")
        return table

    def markdown(self, subject: str) -> str:
        """The same table for a page."""
        rows, columns = self.rows(subject), self.columns(subject)
        lines = [f"| {subject} | seeds | {' | '.join(columns)} |", f"|---|--:|{'--:|' * len(columns)}"]
        lines += [f"| {name} | {len(cells)} | {' | '.join(_texts(cells, columns))} |" for name, cells in rows.items()]
        return "\n".join([*lines, f"| N | | {' | '.join(_count(rows, column) for column in columns)} |"])

    def draw(self, path: str | Path) -> None:
        """For each concept: what is left of the target against what is left of the rest, with arrows to relearning."""
        from matplotlib.figure import Figure

        subjects = self.subjects
        figure = Figure(figsize=(5.2 * len(subjects), 4.6), layout="constrained")
        panels = figure.subplots(1, len(subjects), squeeze=False)[0]
        names = list(dict.fromkeys(name for subject in subjects for name in self.rows(subject)))
        colors = {name: "black" if name == UNEDITED else f"C{n % 10}" for n, name in enumerate(names)}
        for panel, subject in zip(panels, subjects, strict=True):
            _draw_panel(panel, subject, self.rows(subject), colors)
        panels[0].set_ylabel("target accuracy (arrow: after relearning)")
        handles = {
            text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def compare(
    model: LanguageModel,
    subjects: Mapping[str, Subject],
    contenders: Sequence[Contender],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | Path,
    attacks: Mapping[str, LanguageAttack] | None = None,
    limit: int | None = None,
) -> Comparison:
    """Erase each concept with each method and seed, and measure every edit in the same way.

    A cell's folder holds the edit, the report and the settings. Cells that are done are not repeated; where two seeds
    give the same edit, only the attacks are run again. A method that fails on a concept leaves its sentence instead.
    Attacks are scored on the target's questions; their control, texts of another concept, with the first seed only.
    Raises ValueError when the folder holds cells made with other settings, or two contenders have one name.
    """
    if len({c.name for c in contenders}) < len(contenders):
        raise ValueError("Two contenders have one name.")
    runner = _Runner(model, Path(folder), dict(attacks or {}), limit, seeds)
    todo = [(s, c, seed) for s in subjects for c in contenders for seed in seeds]
    for subject in subjects:
        for seed in seeds:
            runner.unedited(subject, subjects[subject], seed)
    for name, contender, seed in track(todo, "cells"):
        runner.cell(name, subjects[name], contender, seed)
    return Comparison.load(folder)


@dataclass(frozen=True)
class _Runner:
    model: LanguageModel
    folder: Path
    attacks: Mapping[str, LanguageAttack]
    limit: int | None
    seeds: Sequence[int]

    def unedited(self, name: str, subject: Subject, seed: int) -> Report:
        """Scores of the model as it is, attacks included; the benchmark itself is run once."""
        identity = self._identity(subject, UNEDITED)

        def make(place: Path) -> Report:
            first = self.folder / name / f"{UNEDITED}-{self.seeds[0]}" / DONE
            known = _plain(Report.load(first)) if first.is_file() else None
            base = known or subject.benchmark.run(self.model, subject.concept, limit=self.limit)
            return Report.joined([base, self._attacked(subject, None, None, seed)])

        return self._kept(name, UNEDITED, seed, identity, make)

    def cell(self, name: str, subject: Subject, contender: Contender, seed: int) -> None:
        settings = [type(contender.eraser).__name__, vars(contender.eraser), contender.sites]
        identity = self._identity(subject, settings)

        def make(place: Path) -> Report:
            unedited = self.unedited(name, subject, seed)
            edit = self._edit(subject, contender, seed, place)
            base = self._same(name, contender, edit, place)
            base = base or subject.benchmark.run(
                self.model, subject.concept, edit=edit, unedited=_plain(unedited), limit=self.limit
            )
            return Report.joined([base, self._attacked(subject, edit, unedited, seed)])

        self._kept(name, contender.name, seed, identity, make)

    def _edit(self, subject: Subject, contender: Contender, seed: int, place: Path) -> Edit:
        if (place / "edit.json").is_file():
            return Edit.load(place)
        more: dict[str, Any] = {} if contender.sites is None else {"sites": contender.sites}
        edit = contender.eraser.erase(self.model, subject.concept, seed=seed, **more)
        edit.save(place)
        return edit

    def _same(self, name: str, contender: Contender, edit: Edit, place: Path) -> Report | None:
        """The plain scores of another seed whose edit is bit for bit this one (its file has the same hash)."""
        mine = {path.name for path in place.glob("edit-*.safetensors")}
        for other in sorted((self.folder / name).glob(f"{contender.name}-*/{DONE}")):
            if other.parent != place and {path.name for path in other.parent.glob("edit-*.safetensors")} == mine:
                return _plain(Report.load(other))
        return None

    def _attacked(self, subject: Subject, edit: Edit | None, unedited: Report | None, seed: int) -> Report:
        benchmark = subject.benchmark
        goal = goal_of(subject.concept, benchmark)
        control = subject.control if seed == self.seeds[0] else None
        parts = [
            attacked(
                self.model,
                benchmark.target,
                attack,
                goal,
                edit=edit,
                unedited=unedited,
                control=control,
                seed=seed,
                name=name,
                limit=self.limit,
            )
            for name, attack in self.attacks.items()
        ]
        return Report.joined(parts)

    def _identity(self, subject: Subject, what: Any) -> str:
        attacks = {name: [type(a).__name__, vars(a)] for name, a in self.attacks.items()}
        record = {"what": what, "benchmark": subject.benchmark.model_dump(), "attacks": attacks, "limit": self.limit}
        return run_identity(record, subject.concept, self.model)

    def _kept(self, name: str, method: str, seed: int, identity: str, make: Callable[[Path], Report]) -> Report:
        place = self.folder / name / f"{method}-{seed}"
        for known in (place / DONE, place / FAILED):
            if known.is_file():
                return _checked(known, identity)
        about = {"subject": name, "method": method, "seed": seed, "identity": identity}
        start = time.perf_counter()
        try:
            report = make(place)
        except (ValueError, FloatingPointError) as error:
            if method == UNEDITED:
                raise
            _write(place / FAILED, {"scores": [], "settings": {**about, "failed": str(error)}})
            return Report(())
        about["seconds"] = time.perf_counter() - start
        Report(report.scores, {**report.settings, **about}).save(place / DONE)
        return report


def values(report: Report) -> dict[str, tuple[Score, float]]:
    """Column -> (a score that stands for it, its value): roles, perplexity, fluency; of an attack the highest value."""
    found: dict[str, tuple[Score, float]] = {}
    for score in _plain(report).scores:
        if (column := COLUMNS.get(score.metric, score.task)) in ALWAYS and score.part == "all":
            found.setdefault(column, (score, score.value))
    for score in report.scores:
        title, colon, _ = score.part.partition(":")
        attack, on, _ = title.partition(" on ")
        attack += CONTROL if on else ""
        if colon and score.metric == "acc" and (attack not in found or score.value > found[attack][1]):
            found[attack] = (score, score.value)
    return found


def interval(scores: Sequence[Score]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) over seeds: the error of the questions, which all seeds share, and
    that of the seeds."""
    numbers = [score.value for score in scores]
    within = mean((score.error or 0.0) ** 2 for score in scores)
    between = variance(numbers) / len(numbers) if len(numbers) > 1 else 0.0
    return mean(numbers), 1.96 * (within + between) ** 0.5


def _texts(cells: Sequence[Cell], columns: Sequence[str], digits: int = 3) -> Iterator[str]:
    found = [values(cell.report) for cell in cells if not cell.failed]
    for column in columns:
        scores = [f[column][0] for f in found if column in f]
        if not scores:
            yield "failed" if any(cell.failed for cell in cells) else "–"
            continue
        middle, half = interval(scores)
        yield f"{middle:.{digits}f} ± {half:.{digits}f}" if middle < 5 else f"{middle:.0f} ± {half:.0f}"


def _count(rows: Mapping[str, Sequence[Cell]], column: str) -> str:
    counts = {v[column][0].n for cells in rows.values() for c in cells if column in (v := values(c.report))}
    return ", ".join(map(str, sorted(counts)))


def _draw_panel(panel: Any, subject: str, rows: Mapping[str, Sequence[Cell]], colors: Mapping[str, str]) -> None:
    for name, cells in rows.items():
        found = [values(cell.report) for cell in cells if not cell.failed]
        if not found:
            continue
        (x, wide), (y, high) = (interval([f[role][0] for f in found]) for role in ("general", "target"))
        panel.errorbar(x, y, high, wide, color=colors[name], marker="o", capsize=2, linestyle="none", label=name)
        if all("relearning" in f for f in found):
            back = mean(f["relearning"][1] for f in found)
            panel.annotate("", (x, back), (x, y), arrowprops={"arrowstyle": "->", "color": colors[name], "alpha": 0.7})
    chance = next(
        (s.chance for cells in rows.values() for c in cells for s in c.report.scores if s.task == "target"), None
    )
    if chance is not None:
        panel.axhline(chance, color="grey", linestyle=":", linewidth=1)
        panel.annotate(
            "chance", (0.01, chance), xycoords=("axes fraction", "data"), color="grey", va="bottom", fontsize=8
        )
    panel.set_title(subject)
    panel.set_xlabel("accuracy on everything else")
    panel.set_ylim(0, 1)


def _plain(report: Report) -> Report:
    """Without the scores of attacks."""
    return Report(tuple(s for s in report.scores if ":" not in s.part), report.settings)


def _checked(path: Path, identity: str) -> Report:
    report = Report.load(path)
    if report.settings.get("identity") != identity:
        raise ValueError(f"{path} was made with other settings; compare into another folder, or delete it.")
    return report


def _load(path: Path) -> Cell:
    report = Report.load(path)
    about = report.settings
    try:
        fields = (about["subject"], about["method"], about["seed"], report)
        return Cell(*fields, about.get("failed", ""))
    except KeyError as error:
        raise ValueError(f"{path} is no cell of a comparison: {error} is missing.") from None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
