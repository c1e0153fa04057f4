"""The search: chosen on the dev half of a benchmark, reported on the test half."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.eraser import Eraser, run_identity
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.image_columns import Judges
from conceptx.evaluation.report import Report
from conceptx.models import ImageModel, LanguageModel
from conceptx.progress import report as tell
from conceptx.store import write_atomically
from conceptx.tuning.halves import Halves, halves_of
from conceptx.tuning.objective import quality
from conceptx.tuning.space import Space, plain
from conceptx.tuning.trials import Origin, Trial, Tuning, best_of, write_json


def tune(
    method: type[Eraser],
    model: LanguageModel | ImageModel,
    concept: Concept,
    benchmark: Benchmark | ImageBenchmark,
    *,
    judges: Judges | None = None,
    budget: int = 20,
    seed: int = 0,
    folder: str | Path,
    start: Mapping[str, Any] | None = None,
    fields: Sequence[str] | None = None,
) -> Tuning:
    """Search the settings of a method that are marked as tunable, for one concept on one model.

    Trial 0 has the published defaults, trial 1 the settings of `start`; the others come from a tree-structured Parzen
    estimator (Optuna). What is not searched is as in `start`, or else as published. Every trial is scored on the dev
    half of the benchmark; on the test half only the defaults, the start and the best trial are, and nothing is chosen
    there.

    judges: who looks at the pictures of an image model.
    budget: number of trials, the two included.
    folder: every finished trial is a file there; the same call again goes on after the last one and ends as if it had
            not been interrupted, and so does one with a larger budget. `best.toml` is the recipe and `best/` the edit
            of the best trial.
    fields: what is searched; default, all that is marked.

    A trial whose settings or numbers are impossible (ValueError, KeyError, ArithmeticError) counts as worst and is kept
    with its sentence. Raises ValueError when nothing is tunable, when the benchmark is for another kind of model
    or lacks what `quality` needs, when the folder holds another search, or when no trial could be scored; ImportError
    when optuna is not installed.
    """
    _require_optuna()
    model.require_unedited()
    halves = halves_of(model, concept, benchmark, judges)
    search = _Search.of(method, halves, seed, Path(folder), start, fields)
    if budget < len(search.known):
        raise ValueError(f"budget must be at least {len(search.known)}, got {budget}.")
    search.claim()
    before = {half: search.unedited(half) for half in ("dev", "test")}
    trials = search.finished()
    tell("tuning", len(trials), max(budget, len(trials)))
    while len(trials) < budget:
        trials.append(search.trial(trials, before))
        tell("tuning", len(trials), budget, f"best {best_of(trials).quality.mean:.2f}")
    return search.result(trials, before["test"])


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ImportError("Tuning needs optuna: pip install 'conceptx[tune]'.") from None


@dataclass(frozen=True)
class _Search:
    """What stays the same from trial to trial.

    known: all settings of the trials that are not searched, by their origin; those of the last one are kept where the
           search does not vary them.
    """

    method: type[Eraser]
    halves: Halves
    seed: int
    folder: Path
    known: Mapping[Origin, dict[str, Any]]
    space: Space

    @staticmethod
    def of(
        method: type[Eraser],
        halves: Halves,
        seed: int,
        folder: Path,
        start: Mapping[str, Any] | None,
        fields: Sequence[str] | None,
    ) -> _Search:
        known: dict[Origin, dict[str, Any]] = {"published": _settings(method())}
        if start is not None:
            known["start"] = _settings(method.from_settings(start))
        space = Space.of(method, fields, list(known.values()))
        return _Search(method, halves, seed, folder, known, space)

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that are not searched."""
        last = list(self.known.values())[-1]
        return {name: value for name, value in last.items() if name not in self.space.parts}

    # -- files -----------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Write whose folder it is. Raises ValueError when it is another search's."""
        record = {
            "method": self.method.__name__,
            "concept": self.halves.concept.name,
            "seed": self.seed,
            "settings": dict(self.known),
            "space": plain(self.space.plain()),
        }
        whole = {**record, "benchmark": self.halves.benchmark.model_dump(mode="json")}
        mine = {**record, "identity": run_identity(whole, self.halves.concept, self.halves.model)}
        path = self.folder / "search.json"
        if not path.is_file():
            write_json(path, mine)
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs["identity"] != mine["identity"]:
            names = [name for name in record if theirs[name] != record[name]] or ["model, texts or benchmark"]
            raise ValueError(f"{self.folder} holds a search with another {names[0]}; give a new folder.")

    def finished(self) -> list[Trial]:
        """The trials whose files are there."""
        trials: list[Trial] = []
        while (path := self._file(len(trials))).is_file():
            trials.append(Trial.load(path))
        return trials

    def unedited(self, half: str) -> Report:
        """The un-edited model's scores, measured once. Raises ValueError when they are not enough for `quality`."""
        report = self._once(f"unedited-{half}.json", lambda: self.halves.scores(half))
        quality(report.beside(report))
        return report

    def _once(self, name: str, make: Callable[[], Report]) -> Report:
        path = self.folder / name
        if not path.is_file():
            make().save(path)
        return Report.load(path)

    def _file(self, number: int) -> Path:
        return self.folder / f"trial-{number:03}.json"

    # -- trials ----------------------------------------------------------------------------------------------------

    def trial(self, done: Sequence[Trial], before: Mapping[str, Report]) -> Trial:
        """The next trial; its file is written last, when all that belongs to it is there."""
        trial, edit = self._tried(self._next(done), before["dev"])
        if edit is not None:
            if trial.origin != "search":
                self._tested(trial, lambda: edit, before["test"])
            if best_of([*done, trial]) is trial:
                edit.save(self.folder / "best")
        trial.save(self._file(trial.number))
        return trial

    def _next(self, done: Sequence[Trial]) -> Trial:
        number = len(done)
        if number < len(self.known):
            origin, settings = list(self.known.items())[number]
            return Trial(number, origin, settings)
        seen = [(trial.settings, trial.quality.mean) for trial in done if self._comparable(trial)]
        return Trial(number, "search", {**self.fixed, **self.space.ask(seen, (self.seed * 100_003 + number) % 2**32)})

    def _comparable(self, trial: Trial) -> bool:
        """Whether what is not searched is the same; it is not in the defaults when the start changes it."""
        return all(trial.settings[name] == value for name, value in self.fixed.items())

    def _tried(self, trial: Trial, unedited: Report) -> tuple[Trial, Edit | None]:
        """With its scores and its edit, or with the sentence that says why there are none."""
        begin = time.perf_counter()
        found: dict[str, Any]
        edit = None
        try:
            edit = self._erased(trial)
            found = {"report": self.halves.scores("dev", edit, unedited)}
            quality(found["report"])
        except (ArithmeticError, ValueError, KeyError) as error:
            edit, found = None, {"problem": str(error.args[0] if error.args else type(error).__name__)}
        return dataclasses.replace(trial, seconds=time.perf_counter() - begin, **found), edit

    def _erased(self, trial: Trial) -> Edit:
        return self.method.from_settings(trial.settings).erase(self.halves.model, self.halves.concept, seed=self.seed)

    def _tested(self, trial: Trial, edit: Callable[[], Edit], unedited: Report) -> Report:
        """The scores on the test half."""
        return self._once(f"test-{trial.number:03}.json", lambda: self.halves.scores("test", edit(), unedited))

    # -- results ---------------------------------------------------------------------------------------------------

    def result(self, trials: Sequence[Trial], unedited: Report) -> Tuning:
        """With the best trial's test scores and recipe. Raises ValueError when no trial could be scored."""
        best = best_of(trials)
        if best.report is None:
            raise ValueError(f"None of {len(trials)} trials could be scored; the first says: {trials[0].problem}")
        named = [trial for trial in trials if trial is best or (trial.origin != "search" and trial.report is not None)]
        tests = {trial.number: self._tested(trial, partial(self._again, trial, best), unedited) for trial in named}
        self._write_recipe(best, len(trials))
        return Tuning(self.method.__name__, tuple(self.space.parts), tuple(trials), tests)

    def _again(self, trial: Trial, best: Trial) -> Edit:
        return Edit.load(self.folder / "best") if trial is best else self._erased(trial)

    def _write_recipe(self, best: Trial, trials: int) -> None:
        """The settings that differ from the published ones, as `settings.read_recipe` reads them."""
        q, name = best.quality, json.dumps(self.halves.concept.name)
        lines = [
            f"# {self.method.__name__}, {name}: trial {best.number} of {trials}, chosen on",
            f"# the dev half: removal {q.removal:.3f}, retention {q.retention:.3f}, fluency {q.fluency:.3f}.",
        ]
        published = self.known["published"]
        lines += [_line(name, value) for name, value in best.settings.items() if value != published[name]]
        text = "\n".join(lines) + "\n"
        write_atomically(self.folder / "best.toml", lambda path: path.write_text(text, encoding="utf-8"))


def _settings(eraser: Any) -> dict[str, Any]:
    return plain(dataclasses.asdict(eraser))


def _line(name: str, value: Any) -> str:
    if value is None:
        return f"# {name} is None, for which TOML has no word: --set {name}=none"
    return f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_toml(part)}' for key, part in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)
