"""The trade-off of a search in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from conceptx.store import write_atomically
from conceptx.tuning.objective import Quality, quality
from conceptx.tuning.trials import Trial, Tuning

SHAPES = {"published": "s", "start": "^", "search": "o"}
HEIGHTS = {"published": -18, "start": -4, "search": 9}  # of a name above its mark, in points: three apart
UNEDITED = Quality(removal=0, retention=1, fluency=1)
CHOSEN = "crimson"


def draw(tuning: Tuning, path: Path) -> Path:
    """Retention to the right, removal upwards, fluency as colour: the trials, their front, and the test half."""
    figure, panel = _figure()
    scored = [trial for trial in tuning.trials if trial.report is not None]
    front = pareto([UNEDITED, *(trial.quality for trial in scored)])
    panel.plot(*zip(*front, strict=True), color="0.65", linewidth=1.2, zorder=1, label="front of the trade-off")
    shown = None
    for trial in scored:
        shown = _trial(panel, trial, tuning.name(trial))
    panel.plot(*_place(UNEDITED), "X", color="black", markersize=9, zorder=4)
    _name(panel, "un-edited", UNEDITED, HEIGHTS["search"])
    _tests(panel, tuning)
    figure.colorbar(shown, ax=panel, label="fluency", shrink=0.85)
    panel.set_title(f"{tuning.method}, {len(tuning.trials)} trials ({len(scored)} scored)", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    content = BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    return path


def pareto(points: Sequence[Quality]) -> list[tuple[float, float]]:
    """(retention, removal) of the points that no other one beats in both, by falling retention."""
    front: list[tuple[float, float]] = []
    for place in sorted({_place(q) for q in points}, reverse=True):
        if not front or place[1] > front[-1][1]:
            front.append(place)
    return front


def _place(q: Quality) -> tuple[float, float]:
    return q.retention, q.removal


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.8), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.set(xlim=(-0.04, 1.06), ylim=(-0.11, 1.08))
    panel.set_xlabel("retention: what is kept of everything else →")
    panel.set_ylabel("removal: what is lost of the concept →")
    return figure, panel


def _trial(panel: Any, trial: Trial, name: str) -> Any:
    """Its mark, with its name where it has one; the chosen one with a ring."""
    place, chosen = _place(trial.quality), "chosen" in name
    options = {"edgecolors": "black", "linewidths": 1.2 if name else 0.4, "cmap": "viridis", "vmin": 0, "vmax": 1}
    shape, size = SHAPES[trial.origin], 90 if name else 45
    mark = panel.scatter(*place, s=size, c=[trial.quality.fluency], marker=shape, zorder=3, **options)
    if chosen:
        panel.plot(*place, "o", markersize=17, markerfacecolor="none", color=CHOSEN, markeredgewidth=2, zorder=4)
    if name:
        height = HEIGHTS["search" if chosen else trial.origin]
        _name(panel, f"{name} (trial {trial.number})", trial.quality, height, CHOSEN if chosen else "black")
    return mark


def _name(panel: Any, text: str, q: Quality, height: int, color: str = "black") -> None:
    from matplotlib.patheffects import withStroke

    right = q.retention > 0.5
    panel.annotate(
        text,
        _place(q),
        (-13 if right else 13, height),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=9,
        color=color,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )


def _tests(panel: Any, tuning: Tuning) -> None:
    """Where the named trials lie on the test half, joined with their place on the dev half."""
    label = "the same on the test half"
    for number, report in tuning.tests.items():
        trial, place = tuning.trials[number], _place(quality(report))
        color = CHOSEN if trial is tuning.best else "black"
        panel.plot(*zip(_place(trial.quality), place, strict=True), ":", color=color, linewidth=1, zorder=2)
        panel.plot(*place, "D", markersize=6, markerfacecolor="white", color=color, zorder=3, label=label)
        label = "_"
