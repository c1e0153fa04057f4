"""Is what the edited model writes still language? Reverse perplexity of its generations (ELM, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from conceptx.edit import Edit
from conceptx.evaluation.report import Report, Score
from conceptx.models import LanguageModel

TASK = "fluency"


def fluency(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    edit: Edit | None = None,
    unedited: Report | None = None,
    max_new_tokens: int = 40,
    samples: int = 2,
    seed: int = 0,
) -> Report:
    """Scores of sampled continuations of the prompts, with and (beside) without the edit.

    reverse_perplexity: perplexity of the continuations under the un-edited model, given the prompt (low: seamless).
    The paper uses another, larger model as the judge; here it is the model itself before the edit.
    distinct_2: distinct pairs of neighbouring tokens in a continuation over all pairs; loops are fluent to a judge
    and are seen here only (1: no pair twice).

    unedited: a report that holds these scores of the un-edited model already; else they are measured here.
    samples: continuations of each prompt, drawn at temperature 1 from the 95 % most likely tokens.
    Raises ValueError when there is no prompt.
    """
    if model.applied:
        raise ValueError("An edit is in force on this model; undo it and give it as the argument edit.")
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    if unedited is None or TASK not in {score.task for score in unedited.scores}:
        unedited = _score(model, repeated, _generate(model, repeated, max_new_tokens, seed))
    if edit is None:
        return Report(tuple(score for score in unedited.scores if score.task == TASK))
    with edit.applied(model):
        edited = _generate(model, repeated, max_new_tokens, seed)
    return _score(model, repeated, edited).beside(unedited)


def _generate(model: LanguageModel, prompts: list[str], length: int, seed: int) -> list[str]:
    options = {"seed": seed, "max_new_tokens": length, "min_new_tokens": length, "top_p": 0.95, "top_k": 0}
    options |= {"temperature": 1.0, "repetition_penalty": 1.0}  # whatever the checkpoint's own defaults are
    return model.generate(prompts, **options)  # type: ignore[arg-type]


def _score(model: LanguageModel, prompts: list[str], continuations: list[str]) -> Report:
    """Continuations of fewer than three tokens say nothing and are left out."""
    starts = [len(row) for row in model.encode(prompts)]
    wholes = model.encode([prompt + text for prompt, text in zip(prompts, continuations, strict=True)])
    pairs = [(row, start) for row, start in zip(wholes, starts, strict=True) if len(row) > start + 2]
    if not pairs:
        raise ValueError("Every continuation is shorter than three tokens; there is nothing to score.")
    scored = model.log_likelihoods([row for row, _ in pairs], [start for _, start in pairs])
    losses = torch.stack([-tokens.mean() for tokens in scored])
    variety = torch.tensor([_distinct(row[start:]) for row, start in pairs])
    perplexity = float(losses.mean().exp())
    return Report(
        (
            Score(TASK, "reverse_perplexity", perplexity, len(pairs), perplexity * _error(losses)),
            Score(TASK, "distinct_2", float(variety.mean()), len(pairs), _error(variety)),
        )
    )


def _distinct(tokens: Sequence[int]) -> float:
    """Distinct pairs of neighbouring tokens over all pairs."""
    pairs = list(pairwise(tokens))
    return len(set(pairs)) / len(pairs)


def _error(values: torch.Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
