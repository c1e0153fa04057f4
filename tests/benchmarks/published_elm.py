"""The item loop as the ELM authors' released code runs it, written from the specification of it.

One text at a time: three teacher passes of the frozen model (the text alone, after an expert and after a novice
prefix), a float64 target, a student pass with backward; then one retained text with the frozen model's most likely
tokens as labels. The adapter is switched off for the teachers. An optimiser step follows every fourth item.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from conceptx.concept import Concept
from conceptx.methods.elm import ELM, encode_prefixes, personas_of
from conceptx.models import LanguageModel
from conceptx.models.adapters import Adapter, inserted, linear_modules

ACCUMULATION = 4


def published_loop(settings: ELM, model: LanguageModel, concept: Concept, items: int, seed: int = 0) -> None:
    """Train on `items` pairs of one forget and one retain text."""
    draw = random.Random(seed)
    personas = personas_of(concept)
    experts, novices = encode_prefixes(model, personas.expert), encode_prefixes(model, personas.novice)
    forget = model.encode(concept.texts, max_length=settings.max_tokens)
    retain = model.encode(concept.retain_texts, max_length=settings.max_tokens)
    adapter = Adapter(settings.rank, settings.alpha, settings.dropout, linear_modules(model, settings.layers))
    with inserted(model, adapter, seed) as student:
        student.train()
        optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=settings.learning_rate)
        for item in range(items):
            text = draw.choice(forget)
            target = _target(settings, student, draw.choice(experts), draw.choice(novices), text)
            _soft_loss(student, text, target).backward()
            kept = draw.choice(retain)
            _hard_loss(student, kept, _teacher(student, kept)[-len(kept) :].argmax(-1)).backward()
            if (item + 1) % ACCUMULATION == 0:
                optimiser.step()
                optimiser.zero_grad()


def _target(settings: ELM, student: Any, expert: list[int], novice: list[int], text: list[int]) -> torch.Tensor:
    rows = [_teacher(student, [*prefix, *text])[-len(text) :] for prefix in ([], expert, novice)]
    base, knows, does_not = ((row.double() / settings.temperature).log_softmax(-1) for row in rows)
    eta = torch.linspace(1, settings.eta, len(text), dtype=torch.float64)[:, None]
    scores = base + eta * (does_not - knows)
    floor = scores.topk(settings.top_k or scores.shape[-1]).values[:, -1:]
    return scores.masked_fill(scores < floor, -torch.inf).softmax(-1)


@torch.no_grad()
def _teacher(student: Any, tokens: list[int]) -> torch.Tensor:
    student.eval()
    with student.disable_adapter():
        logits = student(input_ids=torch.tensor([tokens])).logits[0]
    student.train()
    return logits


def _soft_loss(student: Any, tokens: list[int], target: torch.Tensor) -> torch.Tensor:
    logits = student(input_ids=torch.tensor([tokens])).logits[0]
    return torch.nn.functional.cross_entropy(logits.double(), target)


def _hard_loss(student: Any, tokens: list[int], labels: torch.Tensor) -> torch.Tensor:
    logits = student(input_ids=torch.tensor([tokens])).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels)
