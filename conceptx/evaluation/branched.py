"""The harness's model, with the options of one question read as branches of one row: the context is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts; None: part of a document), context, option
TAKES_MASK = {"sdpa", "eager"}  # implementations of attention that follow a mask (rows, 1, tokens, tokens)


@dataclass(frozen=True)
class Row:
    """A context and options that go on from it, in one row of tokens: the context, then each option but its last token.

    numbers: which requests the options are.
    """

    context: list[int]
    options: list[list[int]]
    numbers: list[int]

    @property
    def branches(self) -> list[list[int]]:
        return [option[:-1] for option in self.options]

    @property
    def tokens(self) -> list[int]:
        return [*self.context, *chain.from_iterable(self.branches)]

    @property
    def segments(self) -> list[int]:
        """0 for each token of the context, k for those of the k-th branch."""
        owners = ([number] * len(branch) for number, branch in enumerate(self.branches, 1))
        return [0] * len(self.context) + list(chain.from_iterable(owners))

    @property
    def places(self) -> list[int]:
        """Position ids: each branch goes on where the context ends."""
        first = len(self.context)
        return [*range(first), *chain.from_iterable(range(first, first + len(b)) for b in self.branches)]

    @property
    def read(self) -> list[list[int]]:
        """For each option, the indices at which its tokens are predicted."""
        starts = accumulate(map(len, self.branches), initial=len(self.context))
        return [
            [len(self.context) - 1, *range(start, start + len(b))]
            for start, b in zip(starts, self.branches, strict=False)
        ]


def branched_lm(**arguments: Any) -> Any:
    """An `HFLM` with the same answers, which reads the context of several requests once.

    Requests with the same context are one row with a mask in which an option's tokens see the context and their own
    predecessors. Requests that share their context with none, that would see less than their whole past (a context
    longer than `max_length` or the model's sliding window), and parts of documents go HFLM's own way, as all do on an
    attention without such masks (flash). As many requests are computed at a time as HFLM would: `batch_size`, which
    has to be a number.

    Raises ImportError when lm-eval is not installed.
    """
    return _kind()(**arguments)


@cache
def _kind() -> type:
    """The class; made when it is first needed, because lm-eval is heavy to import."""
    from lm_eval.models.huggingface import HFLM

    class BranchedLM(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            rows = shared_rows(requests, self.max_length, _past(self.model.config))
            found: dict[int, tuple[float, bool]] = {}
            for batch in batched(rows, self.batch_size):
                found |= _answers(self.model, batch, self.softmax_dtype)
            for number, answer in found.items():
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            others = [number for number in range(len(requests)) if number not in found]
            if others:
                theirs = super()._loglikelihood_tokens([requests[i] for i in others], disable_tqdm, override_bs)
                found |= dict(zip(others, theirs, strict=True))
            return [found[number] for number in range(len(requests))]

    return BranchedLM


def _past(config: Any) -> float:
    """How many tokens every layer sees, itself included; 0 where attention does not take such a mask."""
    if config._attn_implementation not in TAKES_MASK:
        return 0
    return getattr(config, "sliding_window", None) or float("inf")


def shared_rows(requests: Sequence[Request], longest: int, past: float) -> list[Row]:
    """Rows of at most `longest` tokens for all requests that share their context and see their whole past."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (texts, context, option) in enumerate(requests):
        if texts is not None and len(context) + len(option) - 1 <= min(longest, past):
            groups.setdefault(tuple(context), []).append(number)
    parts = chain.from_iterable(_parts(requests, numbers, longest) for numbers in groups.values())
    return [Row(requests[part[0]][1], [requests[i][2] for i in part], part) for part in parts if len(part) > 1]


def _parts(requests: Sequence[Request], numbers: list[int], longest: int) -> Iterator[list[int]]:
    """Requests with one context, parted so that no row is too long."""
    start = length = len(requests[numbers[0]][1])
    part: list[int] = []
    for number in numbers:
        more = len(requests[number][2]) - 1
        if part and length + more > longest:
            yield part
            part, length = [], start
        part.append(number)
        length += more
    yield part


def batched(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """The longest rows first, with `size` requests or just above in each batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        batch.append(row)
        if sum(len(r.numbers) for r in batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _answers(module: Any, rows: list[Row], dtype: torch.dtype | None) -> dict[int, tuple[float, bool]]:
    """{number of the request: (log p of the option, whether each of its tokens is the likeliest)}."""
    ids, places, mask = (t.to(module.device) for t in _tensors(rows, module.dtype))
    where = torch.tensor([(number, i) for number, row in enumerate(rows) for i in chain.from_iterable(row.read)])
    kept, column = where[:, 1].to(module.device).unique(return_inverse=True)
    out = module(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=kept)
    log_p = out.logits[where[:, 0].to(module.device), column].log_softmax(-1, dtype)
    options = [option for row in rows for option in row.options]
    tokens = torch.tensor(list(chain.from_iterable(options)), device=module.device)
    lengths = [len(option) for option in options]
    likely = log_p.gather(1, tokens[:, None])[:, 0].split(lengths)
    greedy = (log_p.argmax(-1) == tokens).split(lengths)
    numbers = chain.from_iterable(row.numbers for row in rows)
    return {n: (float(p.sum()), bool(g.all())) for n, p, g in zip(numbers, likely, greedy, strict=True)}


def _tensors(rows: list[Row], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and position ids (rows, longest), padded on the right, and the mask (rows, 1, longest, longest).

    A token sees what stands before it in the context and in its own segment; padding is a segment of its own.
    """
    longest = max(len(row.tokens) for row in rows)
    ids, places = (_padded(values, longest, 0) for values in ([r.tokens for r in rows], [r.places for r in rows]))
    segments = _padded([row.segments for row in rows], longest, -1)
    seen = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return ids, places, mask[:, None]


def _padded(rows: list[list[int]], longest: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
