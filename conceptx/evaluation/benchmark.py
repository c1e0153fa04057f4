"""A `Benchmark`: which tasks say that a concept is gone, which that its neighbours and the rest are kept."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from conceptx.attacks.attack import Goal, LanguageAttack
from conceptx.concept import Concept
from conceptx.edit import Edit
from conceptx.evaluation.attacked import goal_of
from conceptx.evaluation.fluency import fluency
from conceptx.evaluation.lm_eval import evaluate
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel


class Benchmark(BaseModel):
    """Task names by their role, read from `tasks/benchmarks/*.toml`.

    target, open: questions on the concept, with four options and open.  near: neighbouring domains.
    general:      everything else.  `*_dev`: the other half of the same questions, on which settings are chosen.
    perplexity:   a held-out corpus.  prompts: beginnings of texts on the concept, for the fluency of generations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: tuple[str, ...]
    target_dev: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    open_dev: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    near_dev: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    general_dev: tuple[str, ...] = ()
    perplexity: str | None = None
    prompts: tuple[str, ...] = ()

    @staticmethod
    def load(path: str | Path) -> Benchmark:
        """Raises FileNotFoundError, or ValueError when the file is no benchmark."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no benchmark file {path}.")
        try:
            return Benchmark(**tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a benchmark: {error}.") from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{path} is not a benchmark: {where}: {problem['msg']}.") from None

    def tasks(self, *, half: str = "test") -> list[str]:
        """All task names of one half of the questions: "test" or "dev"; ValueError for another half."""
        if half not in ("test", "dev"):
            raise ValueError(f"The questions have two halves, test and dev; got {half!r}.")
        suffix = "_dev" if half == "dev" else ""
        roles = ("target", "open", "near", "general")
        names = [name for role in roles for name in getattr(self, role + suffix)]
        return [*names, self.perplexity] if self.perplexity else names

    def run(
        self,
        model: LanguageModel,
        concept: Concept,
        *,
        edit: Edit | None = None,
        unedited: Report | None = None,
        half: str = "test",
        limit: int | None = None,
        attacks: Sequence[LanguageAttack] = (),
        control: Goal | None = None,
        seed: int = 0,
    ) -> Report:
        """Score the model on all of it, and summarise each role.

        attacks: also score the target and open questions under these, which know `goal_of(concept, self)`.
        control: the goal of an unrelated concept, for the same attacks.  seed: theirs.

        Raises ValueError when a prompt is one of the concept's own texts (it would be scored on what it was erased
        with), or when attacks are to be scored on the questions they know.
        """
        if attacks and half == "dev":
            raise ValueError("Attacks know the questions of the dev half; score them on the test half.")
        if overlap := set(self.prompts) & {*concept.texts, *concept.retain_texts}:
            raise ValueError(f"{len(overlap)} prompts are texts of the concept, the first is {min(overlap)!r}.")
        report = evaluate(
            model,
            self.tasks(half=half),
            edit=edit,
            unedited=unedited,
            limit=limit,
            attacks=attacks,
            attacked=[*self.target, *self.open],
            goal=goal_of(concept, self) if attacks else None,
            control=control,
            seed=seed,
        )
        report = Report.joined([self.summary(report, half=half), report])
        return (
            Report.joined([report, fluency(model, self.prompts, edit=edit, unedited=unedited)])
            if self.prompts
            else report
        )

    def summary(self, report: Report, *, half: str = "test") -> Report:
        """One score for each role of which the report has tasks: the mean over their items."""
        suffix = "_dev" if half == "dev" else ""
        rows = []
        for role in ("target", "open", "near", "general"):
            names = set(getattr(self, role + suffix))
            if scores := [s for s in report.scores if s.task in names and s.part == "all"]:
                rows.append(_pooled(role, scores))
        return Report(tuple(rows))


def _pooled(role: str, scores: list[Score]) -> Score:
    n = sum(s.n for s in scores)

    def mean(values: list[float]) -> float:
        return sum(v * s.n for v, s in zip(values, scores, strict=True)) / n

    error = sum(((s.error or 0) * s.n / n) ** 2 for s in scores) ** 0.5
    before = [s.unedited for s in scores if s.unedited is not None]
    unedited = mean(before) if len(before) == len(scores) else None
    return Score(role, scores[0].metric, mean([s.value for s in scores]), n, error, "all", unedited, scores[0].chance)
