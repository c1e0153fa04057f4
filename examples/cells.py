"""What the studies share: a cell is one concept, method and seed, and a file; and numbers out of cells."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from conceptx import Edit, Report
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.places import tasks_folder


def once(path: Path, make: Callable[[], Report]) -> Report:
    """The report in the file, which is made where there is none."""
    if not path.is_file():
        make().save(path)
    return Report.load(path)


def edit_once(folder: Path, make: Callable[[], Edit]) -> tuple[Edit, float]:
    """The edit in the folder, made where there is none, and the processor seconds that took (0 when it was there)."""
    seconds = 0.0
    if not (folder / "edit.json").is_file():
        start = time.process_time()
        made = make()
        seconds = time.process_time() - start
        made.save(folder)
    return Edit.load(folder), seconds


def seeds_of(out: Path, cell: str) -> list[Report]:
    """The reports of a cell, those of all its seeds."""
    return [Report.load(path) for path in sorted(out.glob(f"{cell}-[0-9].json"))]


def drawn_benchmark(name: str, seed: int, **numbers: int) -> ImageBenchmark:
    """One of tasks/benchmarks; another seed draws other pictures, and the eraser gets the same seed."""
    suite = ImageBenchmark.load(tasks_folder() / "benchmarks" / f"{name}.toml")
    return suite.model_copy(update={"seed": suite.seed + 100_000 * seed, **numbers})


def values(reports: Sequence[Report], task: str, *metrics: str, before: bool = False) -> list[float]:
    """Over all items, where one of these metrics was measured; `before`: of the un-edited model."""
    scores = [s for r in reports for s in r.scores if s.task == task and s.metric in metrics and s.part == "all"]
    return [v for s in scores if (v := s.unedited if before else s.value) is not None]


def kept_shares(reports: Sequence[Report]) -> list[float]:
    """Acc_s as a share of the un-edited model's, run by run."""
    pairs = zip(values(reports, "others", "Acc_s"), values(reports, "others", "Acc_s", before=True), strict=True)
    return [after / before for after, before in pairs]


def average(numbers: Sequence[float]) -> str:
    return f"{round(mean(numbers), 4):.3g}" if numbers else "–"


def spread(numbers: Sequence[float]) -> str:
    """The mean, and the smallest and largest."""
    if len(numbers) < 2:
        return average(numbers)
    return f"{average(numbers)} ({min(numbers):.3g}–{max(numbers):.3g})"
