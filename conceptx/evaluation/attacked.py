"""What a language model scores under attack: each attempt is a part of the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptx.attacks.attack import Goal, LanguageAttack, MissingFromGoal
from conceptx.edit import Edit
from conceptx.edit.apply import check
from conceptx.evaluation.harness import Harness, questions
from conceptx.evaluation.report import Report
from conceptx.models import LanguageModel

if TYPE_CHECKING:
    from conceptx.concept import Concept
    from conceptx.evaluation.benchmark import Benchmark


def attacked(
    model: LanguageModel,
    tasks: Sequence[str],
    attack: LanguageAttack,
    goal: Goal,
    *,
    edit: Edit | None = None,
    unedited: Report | None = None,
    control: Goal | None = None,
    seed: int = 0,
    name: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    include_path: str | Path | None = None,
    defaults: bool = False,
) -> Report:
    """Scores of each attempt of one attack, on the edited model and (beside) the un-edited one.

    A score's part is "ATTACK: ATTEMPT"; with a control, an unrelated goal, there are parts "ATTACK on CONTROL: ATTEMPT"
    as well: what the same effort does when it knows nothing of the concept. They are left out where the control has
    not what the attack needs.

    unedited: a report that holds the same attack, with the same settings, on the un-edited model; else it is made here.
    name:     the attack's; None: its class in words.
    tasks, limit, batch_size, include_path, defaults: as in `evaluate`.

    Raises ValueError when a task is unknown, the goal lacks what the attack needs or holds a question that is scored,
    or an edit is in force beside the one given.
    """
    if edit is not None:
        model.require_unedited()
        check(edit, model)
    harness = Harness(limit, batch_size, include_path, defaults)
    names = harness.known(tasks)
    siege = Siege(name or next(iter(named([attack]))), attack, goal, control, seed)
    siege.refuse(harness, names)
    before = siege.report(model, harness, names, unedited)
    if edit is None:
        return before
    with edit.applied(model):
        return siege.report(model, harness, names).beside(before)


def goal_of(concept: Concept, benchmark: Benchmark | None = None) -> Goal:
    """What an attacker knows: the concept's texts and contexts, and the dev half of a benchmark's target questions."""
    tasks = () if benchmark is None else benchmark.target_dev
    known = questions(tasks) if tasks else ()
    return Goal(concept.name, texts=concept.texts, questions=known, contexts=concept.contexts)


def named(attacks: Sequence[LanguageAttack]) -> dict[str, LanguageAttack]:
    """Each attack by the words of its class ("soft prompt"); the second of a kind is "soft prompt 2"."""
    found: dict[str, LanguageAttack] = {}
    for attack in attacks:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(attack).__name__).lower()
        same = sum(type(other) is type(attack) for other in found.values())
        found[f"{name} {same + 1}" if same else name] = attack
    return found


@dataclass(frozen=True)
class Siege:
    """One attack with what it is after, to be carried out on one state of a model after another.

    Raises ValueError when there is no goal.
    """

    name: str
    attack: LanguageAttack
    goal: Goal | None
    control: Goal | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal is None:
            raise ValueError(f"The attack {self.name!r} needs a goal: texts, questions or contexts of the concept.")

    def refuse(self, harness: Harness, tasks: Sequence[str]) -> None:
        """Raises ValueError when the attacker knows the answer to a question that is scored."""
        known = {question.prompt for goal in self._goals for question in goal.questions}
        if known and (overlap := known & harness.prompts(tasks)):
            raise ValueError(
                f"{len(overlap)} questions of the goal are scored, the first is {min(overlap)!r}; give the attack "
                "those of the dev half."
            )

    def report(
        self, model: LanguageModel, harness: Harness, tasks: Sequence[str], known: Report | None = None
    ) -> Report:
        """On the model as it is, unless the known report holds the same attack."""
        if known is not None and known.settings.get(self._key) == self._record(tasks):
            starts = f"{self.name}: ", f"{self.name} on "
            return Report(tuple(s for s in known.scores if s.part.startswith(starts)), known.settings)
        return Report(
            tuple(score for report in self._attempts(model, harness, tasks) for score in report.scores),
            {self._key: self._record(tasks)},
        )

    def _attempts(self, model: LanguageModel, harness: Harness, tasks: Sequence[str]) -> Iterator[Report]:
        for goal in self._goals:
            title = self.name if goal is self.goal else f"{self.name} on {goal.name}"
            try:
                with closing(self.attack.attempts(model, goal, seed=self.seed)) as attempts:
                    for attempt in attempts:
                        report = harness.score(model, tasks, attempt.prefix)
                        whole = (score for score in report.scores if score.part == "all")
                        yield Report(tuple(replace(score, part=f"{title}: {attempt.name}") for score in whole))
            except MissingFromGoal:
                if goal is self.goal:
                    raise

    @property
    def _goals(self) -> list[Goal]:
        return [goal for goal in (self.goal, self.control) if goal is not None]

    @property
    def _key(self) -> str:
        """Of the settings of a report; those of other attacks stand beside it."""
        return f"attack: {self.name}"

    def _record(self, tasks: Sequence[str]) -> Mapping[str, Any]:
        """What determines the attack, as JSON has it."""
        names = {"goal": self.goal and self.goal.name, "control": self.control and self.control.name}
        settings = asdict(self.attack)  # type: ignore[call-overload]
        record = {"attack": type(self.attack).__name__, **settings, **names, "seed": self.seed, "tasks": tasks}
        return json.loads(json.dumps(record))
