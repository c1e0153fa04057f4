"""Textual inversion: what it learns, and that it leaves the host as it was."""

from __future__ import annotations

import pytest
import torch
from hosts import PIPELINES, same, tiny_pipeline

from conceptx.attacks.attack import Goal
from conceptx.attacks.textual_inversion import TextualInversion, noise_loss, replaced

QUICK = TextualInversion(
    templates=("the {} sleeps", "gold and the {}"), steps=2, batch_size=2, learning_rate=0.05, weight_decay=0.0
)


def pictures(model, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    height, width = model._image_size()
    return torch.rand(count, 3, height, width, generator=generator)


def weights(model):
    """A copy of everything that could change: parameters and buffers."""
    named = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def hooks(model):
    """How many there are (transformers keeps some of its own)."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


@torch.no_grad()
def steady_loss(model, attack, token, latents, draws=15):
    """The loss over the same random numbers whatever the token."""
    torch.manual_seed(1)
    texts = [attack.templates[i % 2].format(token.word) for i in range(len(latents))]
    words = {token.word: token.rows}
    return sum(float(noise_loss(model, latents, texts, words)) for _ in range(draws)) / draws


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_host_is_bit_identical_and_its_flags_are_back(kind):
    model = tiny_pipeline(kind)
    for number, parameter in enumerate(model.module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    flags = [p.requires_grad for p in model.module.parameters()]
    before, sizes = weights(model), [len(t) for _, t, _ in model._tokenizers()]
    drawn, hooked = model.generate(["the cat"], seeds=[0], steps=2), hooks(model)
    token = QUICK.search(model, Goal("cat", pictures(model)))
    assert same(weights(model), before)
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert all(p.grad is None for p in model.module.parameters())
    assert [len(t) for _, t, _ in model._tokenizers()] == sizes
    token.generate(model, seeds=[0], steps=1)
    assert torch.equal(model.generate(["the cat"], seeds=[0], steps=2), drawn)
    assert hooks(model) == hooked


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_text_encoder_has_a_row_that_moved_and_matters(kind):
    """The loss depends on each encoder's row, also on those behind the pooled vector (SDXL, SD 3, FLUX)."""
    model = tiny_pipeline(kind)
    still = TextualInversion(QUICK.templates, steps=1, batch_size=1, learning_rate=1e-12, weight_decay=0.0)
    start = still.search(model, Goal("cat", pictures(model)))
    token = QUICK.search(model, Goal("cat", pictures(model)))
    assert set(token.rows) == {name for name in model.module if name.startswith("text_encoder")}
    for name, rows in token.rows.items():
        assert rows.isfinite().all()
        assert (rows - start.rows[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("kind", ["sd2", "sd3"])
def test_the_loss_falls(kind):
    """Against the start, over the same pictures, noise and timesteps."""
    model = tiny_pipeline(kind)
    goal = Goal("cat", pictures(model))
    latents = model.to_latents(goal.images)
    settings = {"templates": QUICK.templates, "batch_size": 6, "weight_decay": 0.0}
    start = TextualInversion(steps=1, learning_rate=1e-12, **settings).search(model, goal)
    token = TextualInversion(steps=40, learning_rate=0.05, **settings).search(model, goal)
    assert len(token.losses) == 40
    before, after = (steady_loss(model, QUICK, t, latents) for t in (start, token))
    assert after < before - 0.005 * before


def test_an_existing_words_own_embedding_changes_nothing():
    """Replacing a word by its own rows gives the prompts, and the pictures, of that word."""
    model = tiny_pipeline("sd3")
    rows = {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        tokenizer = getattr(model.pipeline, name.replace("text_encoder", "tokenizer"))
        tokens = tokenizer("q", add_special_tokens=False).input_ids
        rows[name] = getattr(model.pipeline, name).get_input_embeddings().weight[tokens].detach()
    plain = model.encode(["the q sleeps"])
    with replaced(model, "q", rows):
        assert torch.equal(model.encode(["the q sleeps"]).states, plain.states)
    shifted = {name: row + 1 for name, row in rows.items()}
    with replaced(model, "q", shifted):
        assert not torch.equal(model.encode(["the q sleeps"]).states, plain.states)
        assert torch.equal(model.encode(["the cat sleeps"]).states, model.encode(["the cat sleeps"]).states)
    with replaced(model, "q", shifted):
        inside = model.encode(["the cat sleeps"])
    assert torch.equal(inside.states, model.encode(["the cat sleeps"]).states)  # prompts without the word


def test_a_row_is_the_word_whose_embedding_it_is():
    """The referee is the model itself: a stand-in with the rows of "gold" is the word "gold"."""
    model = tiny_pipeline("sd1")
    encoder, tokenizer = model.pipeline.text_encoder, model.pipeline.tokenizer
    (gold,) = tokenizer("gold", add_special_tokens=False).input_ids
    rows = {"text_encoder": encoder.get_input_embeddings().weight[[gold]].detach()}
    with replaced(model, "q", rows):
        found = model.encode(["the q sleeps", "q"])
    expected = model.encode(["the gold sleeps", "gold"])
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=0)


def test_it_starts_from_the_initial_word_or_the_mean():
    model = tiny_pipeline("sd1")
    table = model.pipeline.text_encoder.get_input_embeddings().weight.detach()
    (gold,) = model.pipeline.tokenizer("gold", add_special_tokens=False).input_ids
    for initial, expected in (("gold", table[gold]), (None, table.mean(0))):
        attack = TextualInversion(
            QUICK.templates, initial=initial, steps=1, batch_size=1, learning_rate=1e-12, weight_decay=0.0
        )
        rows = attack.search(model, Goal("cat", pictures(model))).rows["text_encoder"]
        torch.testing.assert_close(rows[0], expected, rtol=0, atol=1e-9)


def test_the_seed_decides():
    model = tiny_pipeline("sd1")
    goal = Goal("cat", pictures(model))
    rows = [QUICK.search(model, goal, seed=seed).rows["text_encoder"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    token = QUICK.search(model, goal)
    drawn = token.generate(model, seeds=[3, 4, 5], steps=2, guidance=2.0)
    again = token.generate(model, seeds=[3, 4, 5], steps=2, guidance=2.0, batch_size=1)
    assert drawn.shape == (3, 3, 16, 16)
    torch.testing.assert_close(drawn, again, rtol=0, atol=1e-5)  # another batch, other summation orders


def test_it_attacks_the_model_as_it_is():
    """On a model with other weights another embedding is learnt."""
    model, goal = tiny_pipeline("sd1"), Goal("cat", pictures(tiny_pipeline("sd1")))
    before = QUICK.search(model, goal).rows["text_encoder"]
    with torch.no_grad():
        model.denoiser.conv_out.weight.mul_(0.5)
    assert not torch.equal(QUICK.search(model, goal).rows["text_encoder"], before)


def test_a_stand_in_that_a_template_holds_is_passed_over():
    model = tiny_pipeline("sd1")
    attack = TextualInversion(("the q and the {}",), steps=1, batch_size=1)
    assert attack.search(model, Goal("cat", pictures(model))).word == "z"


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"steps": 0}, "positive"),
        ({"batch_size": 0}, "positive"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"templates": ("a cat",)}, "once"),
        ({"templates": ("{} {}",)}, "once"),
        ({"templates": ()}, "once"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TextualInversion(**settings)


def test_wrong_goals():
    model = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match="needs pictures of 'cat'"):
        QUICK.search(model, Goal("cat"))
    with pytest.raises(ValueError, match="the model's are"):
        QUICK.search(model, Goal("cat", torch.rand(2, 3, 32, 32)))
    with pytest.raises(ValueError, match="stand-in"):
        TextualInversion(("q z x j w v {}",), steps=1).search(model, Goal("cat", pictures(model)))
    with pytest.raises(ValueError, match="tokens"):
        TextualInversion(("gold " * 30 + "{}",), steps=1).search(model, Goal("cat", pictures(model)))
