"""One row for all options of a question: HFLM's answers, fewer tokens."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hosts import ALL, GARDEN, METALS, tiny, tokenizer

from conceptx.evaluation import branched
from conceptx.evaluation.branched import Row, batched, branched_lm, shared_rows

HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
LONGEST = 64


def pairs() -> list[tuple[str, str]]:
    """Questions whose options have one token or many; one context that no other has, and one option twice."""
    texts = [*METALS[:3], *GARDEN[:3]]
    options = [" " + text[:n] for text, n in zip(METALS[3:] + GARDEN[3:], (1, 5, 9, 14, 2, 21), strict=True)]
    several = [
        (text[:cut], option) for text, cut in zip(texts, (9, 14, 22, 7, 30, 18), strict=True) for option in options
    ]
    return [*several[::2], ("rain falls on", " the roof"), *several[1::2], several[3]]


def harness(kind, model, **more):
    device = {"device": "cpu", "batch_size": 8, "max_length": LONGEST}
    return kind(pretrained=model.module, tokenizer=model.tokenizer, **device, **more)


@contextmanager
def counted(module):
    """The sizes of all inputs of the model inside the block."""
    sizes: list[int] = []

    def count(_, args, kwargs):
        sizes.append((args[0] if args else kwargs["input_ids"]).numel())

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def encoded(lm, texts) -> list:
    return [(pair, *lm._encode_pair(*pair)) for pair in texts]


def both(model, requests):
    """(answers, tokens computed) of HFLM and of ours."""
    found = []
    for kind in (HFLM, branched_lm):
        lm = harness(kind, model)
        with counted(model.module) as sizes:
            answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        found.append((answers, sum(sizes)))
    return found


def agree(theirs, ours) -> None:
    assert len(theirs) == len(ours)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    torch.testing.assert_close(
        torch.tensor([p for p, _ in ours]), torch.tensor([p for p, _ in theirs]), rtol=1e-4, atol=1e-4
    )


# -- theorems ----------------------------------------------------------------------------------------------------------


def test_a_row_is_the_context_and_each_option_but_its_last_token() -> None:
    row = Row([5, 6], [[7], [8, 9, 10], [11, 12]], [0, 1, 2])
    assert row.tokens == [5, 6, 8, 9, 11]
    assert row.segments == [0, 0, 2, 2, 3]
    assert row.places == [0, 1, 2, 3, 2]
    assert row.read == [[1], [1, 2, 3], [1, 4]]


def test_rows_hold_what_shares_a_context_and_fits() -> None:
    long = list(range(4))
    requests = [
        (("a", "x"), [1, 2], long),  # three more tokens in the row
        (("b", "x"), [3], long),  # alone
        (("a", "y"), [1, 2], long),
        (("a", "z"), [1, 2], long),
        (("a", "v"), [1, 2], [9]),
        (("a", "w"), [1, 2], list(range(9))),  # longer than what the model sees
        (None, [1, 2], long),  # part of a document
        (None, [1, 2], long),
    ]
    rows = shared_rows(requests, longest=8, past=8)
    assert [row.numbers for row in rows] == [[0, 2], [3, 4]]
    assert all(len(row.tokens) <= 8 for row in rows)
    assert [row.numbers for row in shared_rows(requests, longest=99, past=9)] == [[0, 2, 3, 4]]
    assert shared_rows(requests, longest=99, past=0) == []


def test_batches_hold_as_many_requests_as_asked_for() -> None:
    rows = [Row([1] * n, [[2], [3], [4]], [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(1, 8)]
    sizes = [[len(row.context) for row in batch] for batch in batched(rows, 6)]
    assert sizes == [[7, 6], [5, 4], [3, 2], [1]]


# -- against HFLM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in ALL for attention in ("sdpa", "eager") if (kind, attention) != ("gemma2", "sdpa")],
)  # Gemma 2 has no sdpa
def test_answers_are_those_of_hflm_on_every_family(kind: str, attention: str) -> None:
    model = tiny(kind)
    model.module.set_attn_implementation(attention)
    requests = encoded(harness(HFLM, model), pairs())
    (theirs, before), (ours, after) = both(model, requests)
    agree(theirs, ours)
    assert after < 0.75 * before


def test_a_greedy_option_is_seen_as_such() -> None:
    model = tiny()
    lm = harness(HFLM, model)
    context = lm.tok_encode("the cat sleeps")
    likeliest: list[int] = []
    for _ in range(3):
        likeliest.append(int(model.predict([[*context, *likeliest]])[0, -1].argmax()))
    options = [likeliest, [*likeliest[:2], likeliest[2] + 1], likeliest[:1]]
    requests = [(("the cat sleeps", str(option)), context, option) for option in options]
    (theirs, _), (ours, _) = both(model, requests)
    agree(theirs, ours)
    assert [greedy for _, greedy in ours] == [True, False, True]


def test_options_do_not_see_each_other() -> None:
    model = tiny()
    lm = harness(branched_lm, model)
    requests = encoded(lm, pairs()[:3])
    context = requests[0][1]
    one = [(("c", "1"), context, [20, 21, 22]), (("c", "2"), context, [30, 31, 32])]
    other = [one[0], (("c", "3"), context, [40, 41, 42])]
    assert lm._loglikelihood_tokens(one, True)[0] == lm._loglikelihood_tokens(other, True)[0]


# -- its way back to HFLM's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_what_a_sliding_window_cuts_goes_hflms_way(kind: str) -> None:
    """The window is 24: contexts of 20 and of 30 tokens."""
    model = tiny(kind)
    ids = tokenizer()(" ".join(METALS))["input_ids"]
    requests = [((str(cut), str(o)), ids[:cut], ids[o : o + 4]) for cut in (20, 30) for o in (40, 50, 60)]
    (theirs, _), (ours, _) = both(model, requests)
    agree(theirs, ours)
    rows = shared_rows(requests, LONGEST, 24)
    assert [row.numbers for row in rows] == [[0, 1, 2]] and len(rows[0].tokens) > 24


def test_what_is_too_long_is_cut_as_hflm_cuts_it() -> None:
    model = tiny()
    ids = tokenizer()(" ".join([*METALS, *GARDEN]))["input_ids"]
    requests = [(("long", str(o)), ids[: LONGEST + 5], ids[o : o + 4]) for o in (3, 9)]
    requests += [
        (("short", str(o)), ids[:40], ids[o : o + 10]) for o in range(0, 80, 10)
    ]  # eight options, several rows
    (theirs, before), (ours, after) = both(model, requests)
    agree(theirs, ours)
    assert after < before


def test_documents_are_left_to_hflm() -> None:
    model = tiny()
    ids = tokenizer()(" ".join(METALS))["input_ids"]
    document = [(None, [1], ids[start : start + 30]) for start in (0, 30)]
    (theirs, before), (ours, after) = both(model, document)
    assert theirs == ours and before == after


def test_an_attention_without_such_masks_is_left_to_hflm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(branched, "TAKES_MASK", {"eager"})  # the model has sdpa; flash attention is not installed
    (theirs, before), (ours, after) = both(model, encoded(harness(HFLM, model), pairs()))
    assert theirs == ours and before == after


def test_the_cache_of_the_harness_is_told() -> None:
    lm = harness(branched_lm, tiny())
    told = []
    lm.cache_hook.add_partial = lambda what, key, answer: told.append((what, key, answer))
    requests = encoded(lm, pairs())
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert {(key, answer) for _, key, answer in told} == {(r[0], a) for r, a in zip(requests, answers, strict=True)}
