"""The trade-off of a search in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from conceptx.store import write_atomically
from conceptx.tuning.objective import Quality, quality
from conceptx.tuning.trials import Trial, Tuning

SHAPES = {"published": "s", "start": "^", "search": "o"}
UNEDITED = Quality(removal=0, retention=1, fluency=1)
CHOSEN = "crimson"
SIDES = [(side, height) for height in (0, 13, -13, 24, -24) for side in (-1, 1, 0) if side or height]  # of a name
Place = tuple[float, float]  # retention, removal


def draw(tuning: Tuning, path: Path) -> Path:
    """Retention to the right, removal upwards, fluency as colour: the trials, their front, and the test half."""
    figure, panel = _figure()
    scored = [trial for trial in tuning.trials if trial.report is not None]
    front = pareto([UNEDITED, *(trial.quality for trial in scored)])
    panel.plot(*zip(*front, strict=True), color="0.65", linewidth=1.2, zorder=1, label="front of the trade-off")
    shown = None
    for trial in scored:
        shown = _mark(panel, trial, tuning.name(trial))
    panel.plot(*_place(UNEDITED), "X", color="black", markersize=9, zorder=4)
    tested = _tests(panel, tuning)
    figure.colorbar(shown, ax=panel, label="fluency", shrink=0.85)
    panel.set_title(f"{tuning.method}, {len(tuning.trials)} trials ({len(scored)} scored)", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # places are final now
    names = {f"{name} (trial {t.number})": t.quality for t in scored if (name := tuning.name(t))}
    _write_names(panel, {"un-edited": UNEDITED, **names}, [_place(t.quality) for t in scored] + tested)
    content = BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    return path


def pareto(points: Sequence[Quality]) -> list[Place]:
    """(retention, removal) of the points that no other one beats in both, by falling retention."""
    front: list[Place] = []
    for place in sorted({_place(q) for q in points}, reverse=True):
        if not front or place[1] > front[-1][1]:
            front.append(place)
    return front


def _place(q: Quality) -> Place:
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


def _mark(panel: Any, trial: Trial, name: str) -> Any:
    """A trial's mark; with a ring round the chosen one."""
    place = _place(trial.quality)
    options = {"edgecolors": "black", "linewidths": 1.2 if name else 0.4, "cmap": "viridis", "vmin": 0, "vmax": 1}
    shape, size = SHAPES[trial.origin], 90 if name else 45
    mark = panel.scatter(*place, s=size, c=[trial.quality.fluency], marker=shape, zorder=3, **options)
    if "chosen" in name:
        panel.plot(*place, "o", markersize=17, markerfacecolor="none", color=CHOSEN, markeredgewidth=2, zorder=4)
    return mark


def _tests(panel: Any, tuning: Tuning) -> list[Place]:
    """Where the named trials lie on the test half, joined with their places on the dev half."""
    label = "the same on the test half"
    places = []
    for number, report in tuning.tests.items():
        trial, place = tuning.trials[number], _place(quality(report))
        color = CHOSEN if trial is tuning.best else "black"
        panel.plot(*zip(_place(trial.quality), place, strict=True), ":", color=color, linewidth=1, zorder=2)
        panel.plot(*place, "D", markersize=6, markerfacecolor="white", color=color, zorder=3, label=label)
        label = "_"
        places.append(place)
    return places


def _write_names(panel: Any, names: Mapping[str, Quality], marks: Sequence[Place]) -> None:
    """Each name beside its mark, on the side where it covers the fewest marks and other names."""
    taken = [_around(panel, mark) for mark in [*marks, _place(UNEDITED)]]
    for text, q in names.items():
        color = CHOSEN if "chosen" in text else "black"
        tries = [_annotated(panel, text, _place(q), side, height, color) for side, height in SIDES]
        boxes = [note.get_window_extent() for note in tries]
        covered = [sum(box.overlaps(other) for other in taken) + 9 * _outside(panel, box) for box in boxes]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        for note in tries[:best] + tries[best + 1 :]:
            note.remove()


def _annotated(panel: Any, text: str, place: Place, side: int, height: int, color: str) -> Any:
    from matplotlib.patheffects import withStroke

    return panel.annotate(
        text,
        place,
        (side * 13, height),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[side],
        va="center",
        fontsize=9,
        color=color,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=5,
    )


def _around(panel: Any, place: Place) -> Any:
    """The box of a mark on the canvas."""
    from matplotlib.transforms import Bbox

    x, y = panel.transData.transform(place)
    return Bbox.from_extents(x - 6, y - 6, x + 6, y + 6)


def _outside(panel: Any, box: Any) -> bool:
    whole = panel.get_window_extent()
    return box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1
