"""`ARImageModel`: prompts, states with and without a cache, sampling as transformers does it, maps and saving."""

import pytest
import torch
from hosts import same, state, tiny, tiny_janus, tokenizer

from conceptx import Edit, load, wrap
from conceptx.edit import Dense
from conceptx.geometry import Subspace
from conceptx.models import ARImageModel

TEXTS = ["a noto dog", "the polar bear in ink", "x"]


@pytest.fixture(scope="module")
def model():
    return tiny_janus()


@pytest.fixture(scope="module")
def drawn(model):
    return model.sample(model.prompts(TEXTS), seeds=[1, 2, 3], guidance=3.0)


def test_a_prompt_has_template_and_begin_of_image_and_is_padded_on_the_left(model):
    prompts = model.prompts(TEXTS)
    assert prompts.ids.shape == prompts.mask.shape and bool((prompts.ids[:, -1] == model.begin).all())
    words = model.tokenizer.convert_ids_to_tokens(model.token_ids(TEXTS[0]))
    assert words[:2] == ["<s>", "<|User|>"] and words[-2:] == ["<|Assistant|>", "<begin_of_image>"]
    for row, text in enumerate(TEXTS):
        assert prompts.ids[row, prompts.mask[row].bool()].tolist() == model.token_ids(text)


def test_the_processor_reads_prompts_in_the_same_way(model):
    asked = [model._framed(text).removesuffix(model.processor.image_start_token) for text in TEXTS]
    theirs = model.processor(text=asked, generation_mode="image", padding=True, return_tensors="pt")
    ours = model.prompts(TEXTS)
    assert torch.equal(theirs.input_ids, ours.ids) and torch.equal(theirs.attention_mask, ours.mask)


def test_without_a_template_a_prompt_stands_alone():
    model = tiny_janus()
    model.tokenizer = model.processor.tokenizer
    frame = model.tokenizer.chat_template, model.processor.chat_template
    try:
        model.tokenizer.chat_template = model.processor.chat_template = None
        assert model.tokenizer.convert_ids_to_tokens(model.token_ids("a"))[0] == "<s>"
        assert len(model.token_ids("a")) == 3
    finally:
        model.tokenizer.chat_template, model.processor.chat_template = frame


def test_the_place_of_a_name_in_a_prompt(model):
    prompt = "a noto Mobile phone"
    first, end = model.span(prompt)
    words = model.tokenizer.convert_ids_to_tokens(model.token_ids(prompt))
    assert words[first - 1] == "<|User|>" and words[end] == "<|Assistant|>"
    assert model.subject_end(prompt, "mobile phone") == end - 1
    assert model.span("") == (2, 2)
    with pytest.raises(ValueError, match="does not hold 'phon' as whole words"):
        model.subject_end(prompt, "phon")


def test_a_prompt_that_is_too_long_is_refused(model):
    with pytest.raises(ValueError, match=r"has \d+ tokens, the model reads 128"):
        model.prompts(["dog " * 140])
    with pytest.raises(ValueError, match="at least one prompt"):
        model.prompts([])


@torch.no_grad()
def test_encoded_rows_are_those_that_the_decoder_reads(model):
    encoded = model.encode(["a noto dog", ""])
    table = model.module.get_input_embeddings().weight
    for row, text in enumerate(encoded.texts):
        ids = model.token_ids(text)
        assert torch.equal(encoded.states[row, : len(ids)], table[ids])
    assert torch.equal(encoded.subject()[0], table[model.token_ids("a noto dog")[4]])


@torch.no_grad()
@pytest.mark.parametrize("since", [0, 1, 17, 63])
def test_a_window_behind_a_cache_has_the_states_of_the_whole(model, drawn, since):
    """To float32 rounding: attention adds up in another order."""
    prompts = model.prompts(TEXTS)
    whole = model.predict(prompts, drawn[:, :-1])
    assert whole.shape == (3, 64, 192)
    part = model.predict(prompts, drawn[:, :-1], since=since)
    assert torch.allclose(part, whole[:, since:], atol=2e-5)


def test_gradients_of_a_window_do_not_reach_what_lies_before_it(drawn):
    model = tiny_janus()
    prompts = model.prompts(TEXTS)
    model.predict(prompts, drawn[:, :20], since=20).sum().backward()
    table, images = model.module.get_input_embeddings().weight, model.module.model.generation_embeddings.weight
    assert table.grad is None or not table.grad.any()
    touched = images.grad.any(1).nonzero()[:, 0]
    assert set(touched.tolist()) == set(drawn[:, 19].tolist())


def test_a_window_behind_the_tokens_is_refused(model, drawn):
    with pytest.raises(ValueError, match="a window cannot begin at 9"):
        model.predict(model.prompts(TEXTS), drawn[:, :8], since=9)


@torch.no_grad()
def test_a_token_read_alone_knows_nothing_of_its_neighbours(model, drawn):
    alone = model.predict_alone(drawn[:, :5])
    assert torch.allclose(alone[:, 3:4], model.predict_alone(drawn[:, 3:4]), atol=1e-5)
    again = model.predict_alone(drawn[:, :5].flip(1)).flip(1)
    assert torch.allclose(alone, again, atol=1e-5)


def test_the_likeliest_tokens_are_those_of_plain_transformers(model):
    """With guidance; without it the class itself fails (transformers 5.23: it doubles the rows all the same)."""
    prompts = model.prompts(TEXTS)
    theirs = model.module.generate(
        inputs=prompts.ids, attention_mask=prompts.mask, generation_mode="image", do_sample=False, guidance_scale=3.0
    )
    assert torch.equal(model.sample(prompts, seeds=[0, 0, 0], guidance=3.0, temperature=0), theirs)


@torch.no_grad()
def test_without_guidance_the_prompt_alone_speaks(model):
    prompts = model.prompts(TEXTS)
    found = model.sample(prompts, seeds=[0, 0, 0], guidance=1.0, temperature=0)
    assert torch.equal(model.logits(model.predict(prompts, found[:, :-1])).argmax(-1), found)


def test_sampling_follows_the_distribution(model):
    """First tokens of 2,000 seeds: the largest gap of a cumulated share stays below 4 standard errors (.045)."""
    prompts = model.prompts(["a dog"])
    states = model.predict(prompts, prompts.ids[:, :0])[:, -1]
    wanted = model.logits(states)[0].float().softmax(0).detach()
    from conceptx.models.autoregressive import _drawn

    draws = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    found = _drawn(model.logits(states).float().expand(2000, -1).detach(), draws, 1.0)
    shares = torch.bincount(found, minlength=len(wanted)) / 2000
    assert (shares.cumsum(0) - wanted.cumsum(0)).abs().max() < 0.045


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(model, drawn):
    alone = model.sample(model.prompts(TEXTS[1:2]), seeds=[2], guidance=3.0)
    assert torch.equal(drawn[1:2], alone)
    images = model.generate(TEXTS, seeds=[1, 2, 3], guidance=3.0, batch_size=2)
    assert images.shape == (3, 3, 32, 32) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.allclose(images, model.to_images(drawn), atol=1e-6)
    with pytest.raises(ValueError, match="as many seeds"):
        model.generate(TEXTS, seeds=[1])


def test_predictions_that_are_not_finite_are_an_error():
    model = tiny_janus()
    name = "model.generation_head.vision_head.weight"
    broken = Edit(model.fingerprint, deltas={name: Dense(torch.full(model.parameter_shape(name), 3e38))})
    with broken.applied(model), pytest.raises(FloatingPointError, match="predictions of the model are not finite"):
        model.generate(["gold"], seeds=[0])


def test_record_gives_the_texts_own_tokens(model):
    sites = ["text", "layers.2.mlp_input"]
    (found,) = model.record(TEXTS, sites)
    lengths = model.lengths(TEXTS, "text")
    assert lengths == [end - first for first, end in map(model.span, TEXTS)]
    assert all(found[site].shape == (sum(lengths), 192) for site in sites)
    parts = list(model.record(TEXTS, sites, batch_size=1))
    for site in sites:
        assert torch.allclose(torch.cat([part[site] for part in parts]), found[site], atol=1e-5)
    with pytest.raises(KeyError, match=r"no site 'layers\.9"):
        list(model.record(TEXTS, ["layers.9.mlp_input"]))


@torch.no_grad()
def test_record_images_gives_the_states_behind_each_token(model, drawn):
    prompts = model.prompts(TEXTS)
    found = model.record_images(prompts, drawn, ["layers.5.mlp_input", "image_head"])
    assert torch.allclose(found["image_head"], model.predict(prompts, drawn[:, :-1]), atol=1e-5)
    assert found["layers.5.mlp_input"].shape == (3, 64, 192)


@torch.no_grad()
@pytest.mark.parametrize("site", ["layers.1.attention_input", "layers.3.mlp_input", "image_head"])
def test_a_folded_map_does_what_the_map_does(site):
    model = tiny_janus()
    space = Subspace.orthogonal(torch.randn(192, 2, generator=torch.Generator().manual_seed(0)))
    edit = Edit(model.fingerprint, maps={site: (space.removal(),)})
    prompts = model.prompts(TEXTS)
    tokens = torch.zeros(3, 4, dtype=torch.long)

    def said():
        return model.logits(model.predict(prompts, tokens))

    plain = said()
    with edit.applied(model):
        mapped = said()
    with edit.fold(model).applied(model):
        folded = said()
    assert (mapped - plain).abs().max() > 1e-3
    assert torch.allclose(mapped, folded, atol=1e-4)


def test_saved_with_an_edit_and_loaded_by_name(tmp_path):
    model = tiny_janus()
    before = state(model)
    space = Subspace.orthogonal(torch.eye(192)[:, :1])
    edit = Edit(model.fingerprint, maps={"layers.0.attention_input": (space.removal(),)})
    model.save_pretrained(tmp_path / "out", edit)
    assert same(before, state(model)) and not model.applied
    loaded = load(str(tmp_path / "out"))
    assert isinstance(loaded, ARImageModel) and loaded.token_ids(TEXTS[0]) == model.token_ids(TEXTS[0])
    with edit.applied(model):
        wanted = model.generate(TEXTS, seeds=[1, 2, 3])
    assert torch.allclose(loaded.generate(TEXTS, seeds=[1, 2, 3]), wanted, atol=1e-3)
    whole = Edit(model.fingerprint, maps={"text": (space.removal(),)})
    with pytest.raises(ValueError, match=r"cannot be folded|no linear layer"):
        model.save_pretrained(tmp_path / "never", whole)
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_wrapped_is_refused(model):
    with pytest.raises(ValueError, match="needs its processor"):
        wrap(model.module, tokenizer())
    with pytest.raises(ValueError, match="needs its processor"):
        wrap(model.module)
    with pytest.raises(ValueError, match="Unknown autoregressive image model 'llama'"):
        ARImageModel(tiny("llama").module, model.processor)
    assert wrap(model) is model and wrap(model.module, model.processor).applied is model.applied


def test_folded_on_the_disk_as_in_memory(tmp_path):
    """Bit for bit: the same products in the same precision."""
    from conceptx.models.checkpoints import fold_checkpoint

    model = tiny_janus()
    model.save_pretrained(tmp_path / "model", Edit(model.fingerprint))
    space = Subspace.orthogonal(torch.eye(192)[:, :2])
    edit = Edit(model.fingerprint, maps={"layers.1.attention_input": (space.removal(),)})
    model.save_pretrained(tmp_path / "memory", edit)
    fold_checkpoint(tmp_path / "model", edit, tmp_path / "disk")
    first, second = (load(str(tmp_path / name)) for name in ("memory", "disk"))
    assert same(state(first), state(second)) and not same(state(first), state(model))


@torch.no_grad()
def test_a_map_of_the_prompt_leaves_image_tokens_alone(drawn):
    """What passes behind the prompt is what passed before; in one pass, behind a cache, and by plain transformers."""
    model = tiny_janus()
    prompts, site = model.prompts(TEXTS), "layers.0.mlp_input"
    edit = Edit(model.fingerprint, maps={f"prompt.{site}": (Subspace.orthogonal(torch.eye(192)[:, :9]).removal(),)})
    whole = Edit(model.fingerprint, maps={site: (Subspace.orthogonal(torch.eye(192)[:, :9]).removal(),)})
    length, last = (
        prompts.ids.shape[1],
        model.module.get_submodule("model.language_model.layers.0.post_attention_layernorm"),
    )
    found = []
    handle = last.register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        for change in (edit, whole):
            with change.applied(model):
                model._read(prompts, drawn[:, :5])
        model._read(prompts, drawn[:, :5])
    finally:
        handle.remove()
    mapped, everywhere, plain = found
    assert torch.equal(mapped[:, length:], plain[:, length:]) and torch.equal(
        mapped[:, :length], everywhere[:, :length]
    )
    assert (
        not torch.equal(everywhere[:, length:], plain[:, length:]) and float(mapped[:, :length, :9].abs().max()) < 1e-5
    )
    with edit.applied(model):
        alone = model.predict_alone(drawn[:, :30])
        model.encode(TEXTS)  # rows that no decoder reads
        assert torch.equal(model.predict_alone(drawn[:, :30]), alone)
        part, parts = model.predict(prompts, drawn[:, :9]), model.predict(prompts, drawn[:, :9], since=4)
        assert torch.allclose(part[:, 4:], parts, atol=2e-5)
        theirs = model.module.generate(
            inputs=prompts.ids,
            attention_mask=prompts.mask,
            generation_mode="image",
            do_sample=False,
            guidance_scale=3.0,
        )
        assert torch.equal(model.sample(prompts, seeds=[0, 0, 0], guidance=3.0, temperature=0), theirs)
    with pytest.raises(ValueError, match=r"cannot be folded|no linear layer"):
        model.save_pretrained("never", edit)
