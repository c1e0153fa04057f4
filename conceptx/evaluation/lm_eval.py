"""The bridge to lm-evaluation-harness: a model in memory, edited or not, on the library's tasks or its own."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from conceptx.edit import Edit
from conceptx.edit.apply import check
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel
from conceptx.places import tasks_folder
from conceptx.progress import track

METRICS = ("acc", "exact_match", "word_perplexity")


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
) -> Report:
    """Score the model on tasks of lm-evaluation-harness; with an edit, apply it in memory and score both states.

    tasks:        names of tasks, or of groups of tasks.
    unedited:     scores of the un-edited model measured before; None: they are measured here when there is an edit.
    limit:        only the first items of each task (a smoke test, not a result).
    include_path: folder with task files; default, the library's own.  defaults: also the harness's own tasks.

    Raises ValueError that names the tasks there are when one is unknown, or when an edit is in force beside the one
    given, ImportError when lm-eval is not installed.
    """
    if edit is not None:
        model.require_unedited()
        check(edit, model)
    names = _known(tasks, include_path, defaults)
    if edit is None:
        return _run(model, names, limit, batch_size, include_path, defaults)
    if unedited is None:
        unedited = _run(model, names, limit, batch_size, include_path, defaults)
    with edit.applied(model):
        return _run(model, names, limit, batch_size, include_path, defaults).beside(unedited)


def _manager(include_path: str | Path | None, defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError("Evaluating language models needs lm-eval: pip install 'conceptx[eval]'.") from None
    return TaskManager(include_path=str(include_path or tasks_folder() / "lm_eval"), include_defaults=defaults)


def _known(tasks: Sequence[str], include_path: str | Path | None, defaults: bool) -> list[str]:
    if not tasks:
        raise ValueError("No task was given.")
    known = set(_manager(include_path, defaults).all_tasks)
    if missing := [task for task in tasks if task not in known]:
        shown = sorted(known)[:40]
        raise ValueError(f"Unknown tasks {missing}; available: {', '.join(shown)}{', ...' if len(known) > 40 else ''}.")
    return list(dict.fromkeys(tasks))


def _run(
    model: LanguageModel,
    tasks: list[str],
    limit: int | None,
    batch_size: int,
    include_path: str | Path | None,
    defaults: bool,
) -> Report:
    """One task after the other, so that progress can be told; the harness's own bars go nowhere."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(include_path, defaults)
    longest = min(1024, model.module.config.max_position_embeddings)
    scores: list[Score] = []
    for task in track(tasks, "lm-eval tasks"):
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), _level("lm_eval", logging.ERROR):
            harness = HFLM(
                pretrained=model.module,
                tokenizer=model.tokenizer,
                batch_size=batch_size,
                device=str(model.device),
                max_length=longest,
            )
            results = simple_evaluate(
                model=harness,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        scores += [score for name, samples in results["samples"].items() for score in _scores(name, samples, results)]
    return Report(tuple(scores), {"tasks": tasks, "limit": limit, "batch_size": batch_size})


@contextmanager
def _level(name: str, level: int) -> Iterator[None]:
    """A logger at another level for the length of a block."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def _scores(task: str, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Iterator[Score]:
    """The task's main metrics over all items, and over each part where items say whether they were seen."""
    numbers = results["results"][task]
    names = {key.split(",")[0]: key for key in numbers if key.split(",")[0] in METRICS}
    if not names:
        raise ValueError(f"Task {task!r} measures none of {', '.join(METRICS)}.")
    for metric, name in names.items():
        mine = [s for s in samples if s.get("filter", "none") == name.split(",")[1]]
        if metric == "word_perplexity":
            yield _perplexity(task, metric, mine)
            continue
        for part, chosen in _parts(mine).items():
            yield _mean(task, metric, part, chosen)


def _perplexity(task: str, metric: str, samples: Sequence[Mapping[str, Any]]) -> Score:
    """exp(- sum of log-likelihoods / sum of words); its standard error is that of a ratio of sums over documents."""
    pairs = [s[metric] for s in samples]
    n, words = len(pairs), sum(count for _, count in pairs)
    rate = -sum(log_p for log_p, _ in pairs) / words
    residual = sum((-log_p - rate * count) ** 2 for log_p, count in pairs)
    error = (residual * n / max(n - 1, 1)) ** 0.5 / words
    return Score(task, metric, math.exp(rate), n, math.exp(rate) * error)


def _parts(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    parts = {"all": list(samples)}
    for label, flag in (("seen", True), ("unseen", False)):
        if chosen := [s for s in samples if s["doc"].get("seen") is flag]:
            parts[label] = chosen
    return parts if len(parts) == 3 else {"all": parts["all"]}


def _mean(task: str, metric: str, part: str, samples: Sequence[Mapping[str, Any]]) -> Score:
    values = [float(s[metric]) for s in samples]
    n = len(values)
    mean = sum(values) / n
    error = (sum((v - mean) ** 2 for v in values) / (n * max(n - 1, 1))) ** 0.5
    choices = samples[0]["doc"].get("choices")
    chance = 1 / len(choices) if metric == "acc" and isinstance(choices, list) and choices else None
    return Score(task, metric, mean, n, error, part, chance=chance)
