"""Prompts that coax the concept out: learnt embeddings, or words found by coordinate descent."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptx.attacks.attack import Attempt, Goal, Question, needed
from conceptx.attacks.embeddings import found, frozen, standing_in
from conceptx.models import LanguageModel, batches, evaluating
from conceptx.progress import report
from conceptx.train.loop import Plan, train
from conceptx.train.order import rows_of_step

BEHIND = "\n"  # between a prompt and the question
STAND_INS = ("§", "¤", "¶", "~", "|", "^", "q", "z", "x", "j", "w", "v")  # words for a run of tokens that no text has
SAMPLE = 1000  # tokens whose embeddings say how large embeddings are


@dataclass(frozen=True)
class SoftPrompt:
    """Learn embeddings that, put before questions whose answers are known, make the right answers likely.

    Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691) turned on an erased model, as in Schwinn et al.
    2024 (arXiv 2402.09063). The weights stay as they are, so what comes back was in them; other questions are scored
    than those it was learnt on, so that the prompt cannot hold the answers itself.

    min over the embeddings v (m, d) of - E log p(answer | v, question), the log-likelihood summed over its tokens.

    tokens:        m.
    steps, batch_size: of AdamW, and questions a step.
    learning_rate: in units of the root mean square of the embedding table's entries, so that it suits every model.
    """

    tokens: int = 8
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "tokens", "steps", "batch_size", "learning_rate")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}.")

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """One: the prompt after all steps, in force as a prefix of stand-in tokens with the learnt embeddings.

        Raises ValueError when the goal has no questions, or when no stand-in is free.
        """
        from accelerate import Accelerator

        asked = needed(self, goal, "questions")
        text, tokens = stand_in(model, self.tokens, asked)
        rows = Rows.of(model, text + BEHIND, asked)
        student = _Embeddings(*_start(model, len(tokens), seed))
        table = model.module.get_input_embeddings()

        def loss(prompt: _Embeddings, chosen: list[int]) -> Tensor:
            with standing_in([table], tokens, prompt()):
                return -rows.log_p(model, chosen).mean()

        with evaluating(model.module), frozen(model.module):
            accelerator = Accelerator(cpu=model.device.type == "cpu", device_placement=False)
            train(
                student, partial(_chosen, self.batch_size, len(asked), seed), loss, self._plan(goal, seed), accelerator
            )
        with standing_in([table], tokens, student().detach()):
            yield Attempt(f"{self.steps} steps", text + BEHIND)

    def _plan(self, goal: Goal, seed: int) -> Plan:
        return Plan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=seed,
            run="",
            weight_decay=self.weight_decay,
            gradient_clip=0.0,
            what=f"soft prompt for {goal.name}",
        )


class _Embeddings(nn.Module):
    """The learnt rows, in units of the scale."""

    def __init__(self, start: Float[Tensor, "m d"], scale: float) -> None:
        super().__init__()
        self.units = nn.Parameter(start / scale)
        self.scale = scale

    def forward(self) -> Float[Tensor, "m d"]:
        return self.units * self.scale


@torch.no_grad()
def _start(model: LanguageModel, count: int, seed: int) -> tuple[Float[Tensor, "m d"], float]:
    """Embeddings of tokens drawn by the seed, and the root mean square of their entries."""
    table = model.module.get_input_embeddings()
    drawn = random.Random(seed).sample(range(table.num_embeddings), min(max(SAMPLE, count), table.num_embeddings))
    rows = table(torch.tensor(drawn, device=model.device)).float()
    return rows[:count], float(rows.square().mean().sqrt())


def _chosen(size: int, questions: int, seed: int, step: int) -> list[list[int]]:
    """The questions of a step, as its only part."""
    return [rows_of_step(step, min(size, questions), questions, f"{seed} prompt")]


@dataclass(frozen=True)
class GreedyCoordinateGradient:
    """Search for words that, put before questions whose answers are known, make the right answers likely.

    Greedy coordinate gradient (Zou, Wang, Carlini, Nasr, Kolter, Fredrikson 2023, arXiv 2307.15043). In each step the
    gradient with respect to the one-hot tokens proposes `top_k` replacements a slot; `width` of them, one replacement
    each, are scored, and the best is kept if it beats the best so far. Defaults for steps, width and top_k are those in
    the code of PISCES (arXiv 2505.22586); on a CPU 10 steps of width 16 are a minute or two for a model of 135M.

    max over texts of m tokens of E log p(answer | text, question), the log-likelihood summed over its tokens, over
    `questions` of the goal's questions, drawn by the seed once.

    tokens:     m.
    batch_size: rows of tokens that are scored at a time.

    Different from the authors' code: the best so far is what is varied next; no candidate is scored twice; one that
    does not come back from its own text as the same tokens is thrown away, so that the text alone is the attack.
    """

    tokens: int = 20
    steps: int = 1000
    width: int = 64
    top_k: int = 64
    questions: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        _positive(self, "tokens", "steps", "width", "top_k", "questions", "batch_size")

    def attempts(self, model: LanguageModel, goal: Goal, *, seed: int = 0) -> Generator[Attempt, None, None]:
        """One: the best text after all steps, as a prefix.

        Raises ValueError when the goal has no questions, or when there is no text to start from.
        """
        known = needed(self, goal, "questions")
        asked = random.Random(seed).sample(known, min(self.questions, len(known)))
        with evaluating(model.module), frozen(model.module):
            *_, best = self.search(model, goal.name, asked, seed)
        yield Attempt(f"{self.steps} steps", best.prefix)

    def search(self, model: LanguageModel, name: str, asked: Sequence[Question], seed: int = 0) -> Iterator[Candidate]:
        """The best text before the first step and after each one."""
        draw = random.Random(f"{seed} candidates")
        best = self._scored(model, [Candidate.of(model, *stand_in(model, self.tokens, asked), asked)])[0]
        seen = {best.tokens}
        yield best
        for step in range(self.steps):
            found = self._proposed(model, best, asked, seen, draw)
            best = max([best, *self._scored(model, found)], key=lambda candidate: candidate.value)
            seen |= {candidate.tokens for candidate in found}
            report(f"discrete prompt for {name}", step + 1, self.steps, f"log p {best.value:.4g}")
            yield best

    def _proposed(
        self,
        model: LanguageModel,
        best: Candidate,
        asked: Sequence[Question],
        seen: set[tuple[int, ...]],
        draw: random.Random,
    ) -> list[Candidate]:
        """New texts that differ from the best one in one of its slots, in random order."""
        promising = best.gains(model).topk(min(self.top_k, model.module.get_input_embeddings().num_embeddings))
        pairs = [(slot, token) for slot, row in enumerate(promising.indices.tolist()) for token in row]
        found: list[Candidate] = []
        for slot, token in draw.sample(pairs, len(pairs)):
            tokens = (*best.tokens[:slot], token, *best.tokens[slot + 1 :])
            text = model.tokenizer.decode(tokens)
            if tokens not in seen and (candidate := Candidate.of(model, text, tokens, asked)):
                found.append(candidate)
            if len(found) == self.width:
                break
        return found

    @torch.no_grad()
    def _scored(self, model: LanguageModel, candidates: Sequence[Candidate | None]) -> list[Candidate]:
        """Those that are texts, with their values."""
        texts = [candidate for candidate in candidates if candidate is not None]
        whole = Rows([row for c in texts for row in c.rows.ids], [n for c in texts for n in c.rows.answers])
        parts = [whole.log_p(model, chunk) for chunk in batches(range(len(whole.ids)), self.batch_size)]
        values = torch.cat(parts).reshape(len(texts), -1).mean(1).tolist() if parts else []
        return [replace(text, value=value) for text, value in zip(texts, values, strict=True)]


@dataclass(frozen=True)
class Candidate:
    """A text with its tokens, before questions. value: the mean log-likelihood of the right answers."""

    prefix: str
    tokens: tuple[int, ...]
    rows: Rows
    value: float = -math.inf

    @staticmethod
    def of(model: LanguageModel, text: str, tokens: Sequence[int], asked: Sequence[Question]) -> Candidate | None:
        """None where the text before a question is cut into other tokens, or into special ones."""
        if {*tokens} & {*model.tokenizer.all_special_ids}:
            return None
        rows = Rows.of(model, text + BEHIND, asked)
        start = [*model.start, *tokens]
        if any(row[: len(start)] != start for row in rows.ids):
            return None
        return Candidate(text + BEHIND, tuple(tokens), rows)

    def gains(self, model: LanguageModel) -> Float[Tensor, "m vocabulary"]:
        """To first order, what each token in each slot would add to the value, but for one number a slot."""
        table = model.module.get_input_embeddings()
        with torch.no_grad():
            every = table(torch.arange(table.num_embeddings, device=model.device))
        rows = every[list(self.tokens)].float().requires_grad_(True)
        with torch.enable_grad(), standing_in([table], self.tokens, rows):
            (gradient,) = torch.autograd.grad(self.rows.log_p(model).mean(), rows)
        return gradient.to(every.dtype) @ every.T


# -- questions with a prompt before them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Token rows of questions with their right answers. answers: how many tokens of each row are the answer."""

    ids: list[list[int]]
    answers: list[int]

    @staticmethod
    def of(model: LanguageModel, prefix: str, questions: Sequence[Question]) -> Rows:
        """Cut into tokens as the scoring does it: the answer is what the whole has beyond the question."""
        asked = model.encode([prefix + q.prompt for q in questions])
        whole = model.encode([prefix + q.prompt + q.right for q in questions])
        answers = [len(row) - len(start) for row, start in zip(whole, asked, strict=True)]
        if (least := min(answers)) < 1:
            raise ValueError(f"The answer of {questions[answers.index(least)].prompt!r} adds no token to the question.")
        return Rows([[*model.start, *row] for row in whole], answers)

    def log_p(self, model: LanguageModel, chosen: Sequence[int] | None = None) -> Float[Tensor, " n"]:
        """The log-likelihood of each answer, summed over its tokens. Differentiable."""
        chosen = range(len(self.ids)) if chosen is None else chosen
        lengths = [self.answers[i] for i in chosen]
        longest = max(lengths)
        ids, mask = model.pad([self.ids[i] for i in chosen], left=True)
        out = model.module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            # as indices: a slice would be no contiguous tensor, for which torch copies the vocabulary for every row
            logits_to_keep=torch.arange(ids.shape[1] - longest - 1, ids.shape[1] - 1, device=ids.device),
        )
        log_p = out.logits.float().log_softmax(-1)
        each = log_p.gather(2, ids[:, -longest:, None])[..., 0]
        counts = torch.arange(longest, 0, -1, device=ids.device) <= torch.tensor(lengths, device=ids.device)[:, None]
        return (each * counts).sum(1)


def stand_in(model: LanguageModel, count: int, questions: Sequence[Question]) -> tuple[str, list[int]]:
    """A text of that many tokens which keep apart from, and do not occur in, the questions behind it; and the tokens.

    Raises ValueError when there is none.
    """
    for word, blank, repeats in product(STAND_INS, ("", " "), range(count, 0, -1)):
        text = blank.join([word] * repeats)
        (tokens,) = model.encode([text])
        if len(tokens) == count and _free(model, text, tokens, questions):
            return text, tokens
    raise ValueError(f"No stand-in of {count} tokens: none of {' '.join(STAND_INS)} is free in the questions.")


def _free(model: LanguageModel, text: str, tokens: list[int], questions: Sequence[Question]) -> bool:
    if {*tokens} & {*model.tokenizer.all_special_ids}:  # the unknown token is one of them
        return False
    return all(_once(row, tokens) for row in model.encode([text + BEHIND + q.prompt for q in questions]))


def _once(row: list[int], tokens: list[int]) -> bool:
    """Whether the row begins with the tokens and has them nowhere else."""
    places = found(torch.tensor([row]), tokens)
    return bool(places[0, 0]) and int(places.sum()) == 1


def _positive(attack: Any, *names: str) -> None:
    if wrong := [name for name in names if not 0 < getattr(attack, name) < math.inf]:
        raise ValueError(f"{', '.join(wrong)} must be positive and finite.")
