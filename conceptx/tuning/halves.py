"""The two halves of a benchmark: settings are chosen on dev and reported on test, on whatever model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.image_columns import Judges
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.evaluation.report import Report
from conceptx.models import ImageModel, LanguageModel


class Halves(Protocol):
    """A concept's benchmark on a model."""

    @property
    def model(self) -> LanguageModel | ImageModel: ...
    @property
    def concept(self) -> Concept: ...
    @property
    def benchmark(self) -> Benchmark | ImageBenchmark: ...
    def scores(self, half: str, edit: Edit | None = None, unedited: Report | None = None) -> Report:
        """Of "dev" or "test"; of an edit, with the un-edited model's beside. FloatingPointError: it predicts NaN."""
        ...


@dataclass(frozen=True)
class Questions:
    """A language model's: every second question."""

    model: LanguageModel
    concept: Concept
    benchmark: Benchmark

    def scores(self, half: str, edit: Edit | None = None, unedited: Report | None = None) -> Report:
        if edit is not None:
            self._require_finite(edit)
        return self.benchmark.run(self.model, self.concept, edit=edit, unedited=unedited, half=half)

    def _require_finite(self, edit: Edit) -> None:
        """Before anything is sampled: sampling has no sentence for it."""
        rows = self.model.encode([self.concept.name, *self.benchmark.prompts])
        with edit.applied(self.model):
            predictions = self.model.predict(rows, last=1)
        if not predictions.isfinite().all():
            raise FloatingPointError("The predictions of the edited model are not finite.")


@dataclass(frozen=True)
class Pictures:
    """An image model's: every second prompt form. Its un-edited pictures are remembered from edit to edit."""

    model: ImageModel
    concept: Concept
    benchmark: ImageBenchmark
    judges: Judges
    _drawn: Unedited = field(default_factory=Unedited)

    def scores(self, half: str, edit: Edit | None = None, unedited: Report | None = None) -> Report:
        asked = self.benchmark.half(half)
        return evaluate_images(self.model, asked, self.judges, self.concept, edit=edit, unedited=self._drawn)


def halves_of(
    model: LanguageModel | ImageModel,
    concept: Concept,
    benchmark: Benchmark | ImageBenchmark,
    judges: Judges | None,
) -> Halves:
    """Raises ValueError when the benchmark is for another kind of model, or pictures have no judges."""
    if isinstance(model, LanguageModel) and isinstance(benchmark, Benchmark):
        return Questions(model, concept, benchmark)
    if isinstance(model, LanguageModel) or isinstance(benchmark, Benchmark):
        raise ValueError(f"{type(benchmark).__name__} does not score {type(model).__name__}.")
    if judges is None:
        raise ValueError("Pictures need judges.")
    return Pictures(model, concept, benchmark, judges)
