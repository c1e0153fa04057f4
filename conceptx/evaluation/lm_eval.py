"""The bridge to lm-evaluation-harness: a model in memory, edited or not, on the library's tasks or its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conceptx.attacks.attack import Goal, LanguageAttack
from conceptx.edit import Edit
from conceptx.edit.apply import check
from conceptx.evaluation.attacked import Siege, named
from conceptx.evaluation.harness import Harness
from conceptx.evaluation.report import Report
from conceptx.models import LanguageModel


def evaluate(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    edit: Edit | None = None,
    unedited: Report | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    include_path: str | Path | None = None,
    defaults: bool = False,
    attacks: Sequence[LanguageAttack] = (),
    attacked: Sequence[str] | None = None,
    goal: Goal | None = None,
    control: Goal | None = None,
    seed: int = 0,
) -> Report:
    """Score the model on tasks of lm-evaluation-harness; with an edit, apply it in memory and score both states.

    tasks:        names of tasks, or of groups of tasks.
    unedited:     scores of the un-edited model measured before; None: they are measured here when there is an edit.
                  Attacks that it does not hold, with the same settings, are measured here in any case.
    limit:        only the first items of each task (a smoke test, not a result).
    include_path: folder with task files; default, the library's own.  defaults: also the harness's own tasks.
    attacks:      also score each state under these, as `conceptx.evaluation.attacked` does.
    attacked:     the tasks on which it is scored under attack; None: all.
    goal, control, seed: of the attacks: what they know of the concept, and of an unrelated one.

    Raises ValueError that names the tasks there are when one is unknown, when an edit is in force beside the one
    given, or when attacks have no goal or know a question that is scored; ImportError when lm-eval is not installed.
    """
    if edit is not None:
        model.require_unedited()
        check(edit, model)
    harness = Harness(limit, batch_size, include_path, defaults)
    names = harness.known(tasks)
    targets = names if attacked is None else harness.known(attacked)
    sieges = [Siege(name, attack, goal, control, seed) for name, attack in named(attacks).items()]
    for siege in sieges:
        siege.refuse(harness, targets)

    def state(known: Report | None = None) -> Report:
        plain = known or harness.score(model, names)
        return Report.joined([plain, *(siege.report(model, harness, targets, known) for siege in sieges)])

    if edit is None:
        return state()
    before = state(unedited)
    with edit.applied(model):
        return state().beside(before)
