"""Tasks of lm-evaluation-harness: read as questions, or run on a model in memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from conceptx.attacks.attack import Question
from conceptx.evaluation.branched import branched_lm
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel, evaluating
from conceptx.places import tasks_folder
from conceptx.progress import track

METRICS = ("acc", "exact_match", "word_perplexity")
FEWSHOT_SEED = 1234  # that of `lm_eval.simple_evaluate`


def questions(
    tasks: Sequence[str], *, include_path: str | Path | None = None, defaults: bool = False
) -> tuple[Question, ...]:
    """All questions of tasks with options, as the harness asks them.

    Raises ValueError when a task is unknown or its items are not one question with options of which one is right.
    """
    harness = Harness(include_path=include_path, defaults=defaults)
    return tuple(_question(task, doc) for task in harness.load(harness.known(tasks)) for doc in task.eval_docs)


def _question(task: Any, doc: Any) -> Question:
    prompt = task.doc_to_text(doc)
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(prompt, str):
        raise ValueError(f"Task {task.config.task!r} does not ask one question with options, an attack cannot use it.")
    choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
    answer = target if isinstance(target, int) else choices.index(target)
    return Question(prompt, tuple(f"{task.config.target_delimiter}{choice}" for choice in choices), answer)


@dataclass(frozen=True)
class Harness:
    """Where tasks come from and how they are run.

    limit:        only the first items of each task.
    include_path: folder with task files; None: the library's own.  defaults: also the harness's own tasks.
    """

    limit: int | None = None
    batch_size: int = 32
    include_path: str | Path | None = None
    defaults: bool = False

    @cached_property
    def manager(self) -> Any:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ImportError("Evaluating language models needs lm-eval: pip install 'conceptx[eval]'.") from None
        folder = str(self.include_path or tasks_folder() / "lm_eval")
        return TaskManager(include_path=folder, include_defaults=self.defaults)

    def known(self, tasks: Sequence[str]) -> list[str]:
        """The tasks, each once. Raises ValueError that names those there are when one is unknown."""
        if not tasks:
            raise ValueError("No task was given.")
        known = set(self.manager.all_tasks)
        if missing := [task for task in tasks if task not in known]:
            shown = ", ".join(sorted(known)[:40]) + (", ..." if len(known) > 40 else "")
            raise ValueError(f"Unknown tasks {missing}; available: {shown}.")
        return list(dict.fromkeys(tasks))

    def load(self, tasks: Sequence[str]) -> list[Any]:
        """The harness's task objects, those inside groups too."""
        with _hushed():
            return [task for name in tasks for task in self.manager.load([name])["tasks"].values()]

    def prompts(self, tasks: Sequence[str]) -> set[str]:
        """What the tasks ask."""
        texts = (task.doc_to_text(doc) for task in self.load(tasks) for doc in task.eval_docs)
        return {text for text in texts if isinstance(text, str)}

    def score(self, model: LanguageModel, tasks: Sequence[str], prefix: str = "") -> Report:
        """One task after the other, so that progress can be told; `prefix` stands before every question."""
        scores: list[Score] = []
        for name in track(tasks, "lm-eval tasks"):
            results = self._results(model, name, prefix)
            scores += [
                score for task, samples in results["samples"].items() for score in _scores(task, samples, results)
            ]
        return Report(tuple(scores), {"tasks": list(tasks), "limit": self.limit, "batch_size": self.batch_size})

    def _results(self, model: LanguageModel, name: str, prefix: str) -> Mapping[str, Any]:
        """As `lm_eval.simple_evaluate` has them, without its half second in which it describes the environment."""
        from lm_eval.evaluator import evaluate as run

        with _hushed(), _seeded(), evaluating(model.module):
            loaded = self.manager.load([name])
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
            return run(
                lm=self._wrapped(model),
                task_dict=loaded,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=prefix or None,
            )

    def _wrapped(self, model: LanguageModel) -> Any:
        return branched_lm(
            pretrained=model.module,
            tokenizer=model.tokenizer,
            batch_size=self.batch_size,
            device=str(model.device),
            max_length=min(1024, model.module.config.max_position_embeddings),
        )


@contextmanager
def _hushed() -> Iterator[None]:
    """The harness's own bars and remarks go nowhere."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), _level("lm_eval", logging.ERROR):
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of `lm_eval.simple_evaluate`; afterwards random numbers go on as if nothing had been drawn."""
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


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
