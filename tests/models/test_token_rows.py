"""The token rows of phrases, on tiny random pipelines of every architecture."""

import pytest
import torch
from hosts import PIPELINES, tiny_pipeline

from conceptx.models.token_rows import EMPTY, TokenRows

every = pytest.mark.parametrize("kind", PIPELINES)
PHRASES = [
    ("gold", "gold"),
    ("a furnace melts tin", "tin"),
    EMPTY,
    ("xylophone and iron", "xylophone"),
    ("gold", "gold"),
]
CAUSAL = ("sd1", "sd2", "sdxl")


@every
def test_rows_up_to_the_end_do_not_depend_on_the_padding(kind):
    """A causal encoder's rows depend on what is before them alone; the sums are the same, in another order."""
    model = tiny_pipeline(kind)
    texts = [text for text, _ in PHRASES]
    whole, short = model.encode(texts), model.encode(texts, trimmed=True)
    assert torch.equal(whole.first, short.first) and torch.equal(whole.end, short.end)
    assert (short.states.shape[1] < whole.states.shape[1]) == (kind in CAUSAL)
    for number, end in enumerate(whole.end.tolist()):
        torch.testing.assert_close(short.states[number, : end + 1], whole.states[number, : end + 1], rtol=0, atol=1e-5)
    if whole.pooled is not None:
        torch.testing.assert_close(short.pooled, whole.pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_no_more_tokens_are_encoded_than_a_batch_needs(kind):
    model, seen = tiny_pipeline(kind), []
    hook = model.pipeline.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    texts = [*(["gold"] * 64), "a furnace melts tin and lead at a low heat"]
    longest = int(model.encode(texts, trimmed=True).end.max()) + 1
    hook.remove()
    assert sum(rows * length for rows, length in seen) == 64 * 3 + longest


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_tokenizers_hold_what_they_held_also_after_an_error(kind, monkeypatch):
    model = tiny_pipeline(kind)
    held = [tokenizer.model_max_length for _, tokenizer, _ in model._tokenizers()]

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.pipeline, "encode_prompt", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.encode(["gold"], trimmed=True)
    assert [tokenizer.model_max_length for _, tokenizer, _ in model._tokenizers()] == held


@every
def test_the_last_row_of_a_name_is_the_same_however_it_is_asked_for(kind):
    model = tiny_pipeline(kind)
    whole, short = TokenRows.of(model, PHRASES), TokenRows.of(model, PHRASES, trimmed=True)
    together = short.last_rows(PHRASES)
    for row, phrase in zip(together, PHRASES, strict=True):
        torch.testing.assert_close(row, whole.rows(phrase, "last")[0], rtol=0, atol=1e-5)
        assert torch.equal(whole.block(phrase)[whole.last(phrase)], whole.rows(phrase, "last")[0])
        assert torch.equal(whole.rows(phrase, "last+rest")[0], whole.rows(phrase, "last")[0])
    assert torch.equal(together[0], together[-1])


def test_blocks_that_stand_together_are_cut_at_the_tail():
    model = tiny_pipeline("sd1")
    short, long = TokenRows.of(model, PHRASES).aligned([PHRASES[1], PHRASES[3]], "last+rest")
    assert short.shape == long.shape


def test_a_name_that_the_prompt_does_not_hold_is_refused():
    model = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match="does not hold 'silver' as whole words"):
        TokenRows.of(model, [("gold", "silver")]).rows(("gold", "silver"), "last")
