"""How the emoji testbed is made: captions, pictures, losses and stages, without the trained weights."""

import random

import pytest
import torch
from torch import nn

from conceptx.testbeds import stages
from conceptx.testbeds.emoji import networks
from conceptx.testbeds.emoji.drawings import Variation, contact_sheet, pictures, stamped
from conceptx.testbeds.emoji.shipping import attribution, held_out
from conceptx.testbeds.emoji.training import Schedule, Workshop, denoiser_loss, spoiled, standardise
from conceptx.testbeds.emoji.vocabulary import (
    BOTH,
    HELD_OUT,
    HELD_OUT_OBJECT,
    OBJECT_NAMES,
    OBJECT_ONLY,
    OBJECTS,
    STYLE_NAMES,
    STYLES,
    caption,
    every_caption,
    fill,
    find,
)


@pytest.fixture(scope="module")
def drawings():
    """Random drawings in place of the vendors': a coloured disc for every pair."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 96)] * 2, indexing="ij")
    disc = (rows**2 + columns**2 < 0.6).float()
    colours = torch.rand(len(OBJECTS), len(STYLES), 3, 1, 1)
    return torch.cat([colours * disc, disc.expand(len(OBJECTS), len(STYLES), 1, 96, 96)], 2)


# -- words -------------------------------------------------------------------------------------------------------


def test_at_least_two_hundred_objects_with_distinct_names():
    names = [name for thing in OBJECTS for name in (thing.name, *thing.synonyms)]
    assert len(OBJECTS) >= 200 and len(set(names)) == len(names)
    assert sum(" " in name for name in OBJECT_NAMES) >= 15 and sum(bool(thing.synonyms) for thing in OBJECTS) >= 25
    assert {"cat", "tiger", "lion", "leopard"} <= set(OBJECT_NAMES) and find("puppy").name == "dog"
    with pytest.raises(KeyError, match=r"no object 'tigre'; similar: tiger"):
        find("tigre")


def test_only_licences_without_share_alike():
    assert {style.licence for style in STYLES} <= {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert all(style.package in attribution() for style in STYLES)


def test_phrases_never_say_the_name():
    named = [(thing, phrase) for thing in OBJECTS for phrase in thing.phrases]
    assert len(named) > 25
    for thing, phrase in named:
        assert not {*phrase.split()} & {word for name in (thing.name, *thing.synonyms) for word in name.split()}


def test_held_out_templates_are_never_trained():
    assert not {*HELD_OUT} & {*BOTH} and not {*HELD_OUT_OBJECT} & {*OBJECT_ONLY}
    trained = set(every_caption())
    held_out_prompts = {fill(t, name, style) for t in HELD_OUT for name in OBJECT_NAMES for style in STYLE_NAMES}
    assert not trained & held_out_prompts


def test_every_drawn_caption_is_known_and_fits():
    tokenizer, known = networks.build_tokenizer(), set(every_caption())
    draw = random.Random(0)
    drawn = [caption(draw.choice(OBJECTS), draw.choice(STYLE_NAMES), draw) for _ in range(2000)]
    assert {c.text for c in drawn} <= known
    assert max(len(row) for row in tokenizer([*known])["input_ids"]) <= networks.CONTEXT
    assert all(
        any(style in c.text.split() or f"{style}" in c.text for style in STYLE_NAMES) for c in drawn if c.tells_style
    )
    shares = [sum(getattr(c, f"tells_{kind}") for c in drawn) / len(drawn) for kind in ("object", "style")]
    assert 0.9 < shares[0] < 1 and 0.8 < shares[1] < 0.95


def test_the_tokenizer_splits_long_words_and_survives_saving(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = networks.build_tokenizer()
    assert len(tokenizer.tokenize("hippopotamus")) > 1 and len(tokenizer.tokenize("dog")) == 1
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(every_caption()[::97])["input_ids"] == tokenizer(every_caption()[::97])["input_ids"]


# -- pictures ----------------------------------------------------------------------------------------------------


def test_pictures_are_a_function_of_their_generator(drawings):
    first, again, other = (
        pictures(drawings[:20, 0], Variation(), torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (20, 3, 32, 32) and first.min() >= 0 and first.max() <= 1


def test_the_watermark_is_on_the_marked_pictures_only(drawings):
    images, marked = pictures(drawings.flatten(0, 1), Variation(watermark=0.3), torch.Generator().manual_seed(0))
    assert torch.equal((images == stamped(images)).flatten(1).all(1), marked)
    assert abs(float(marked.float().mean()) - 0.3) < 0.05


def test_spoiled_pictures_differ_from_every_picture(drawings):
    images = pictures(drawings[:40, 0], Variation(), torch.Generator().manual_seed(0))[0]
    mush = spoiled(images[:20], images[20:], torch.Generator().manual_seed(1))
    assert mush.shape == (20, 3, 32, 32) and mush.min() >= 0 and mush.max() <= 1
    gap = torch.cdist(mush.flatten(1), images.flatten(1)).min(1).values / 3072**0.5
    assert gap.min() > 0.02


def test_the_contact_sheet_places_every_picture():
    images = torch.rand(6, 3, 4, 4)
    sheet = contact_sheet(images, 3, scale=1)
    assert sheet.shape == (3, 12, 18)
    assert torch.equal(sheet[:, 1:5, 1:5], images[0]) and torch.equal(sheet[:, 7:11, 13:17], images[5])


def test_held_out_examples_are_unmarked_and_new(drawings):
    bytes_ = held_out(drawings)
    assert bytes_.shape == (len(OBJECTS), len(STYLES), 3, 32, 32) and bytes_.dtype == torch.uint8
    assert not torch.equal(stamped(bytes_[0].float() / 255), bytes_[0].float() / 255)


# -- losses ------------------------------------------------------------------------------------------------------


def test_standardised_latents_have_mean_zero_and_variance_one_and_decode_alike():
    torch.manual_seed(0)
    module, images = networks.build_autoencoder(), torch.rand(64, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = module.encode(images).latent_dist
        whole = module.decode(before.mean).sample
        standardise(module, images)
        after = module.encode(images).latent_dist
        assert (module.decode(after.mean).sample - whole).abs().max() < 1e-4
        spread = after.mean.std((0, 2, 3))
        assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4 and (spread - 1).abs().max() < 1e-4
        ratio = after.std / before.std * before.mean.std((0, 2, 3))[:, None, None]
        assert (ratio - 1).abs().max() < 1e-3  # the posterior's width moves with the latents


class Oracle(nn.Module):
    """A denoiser that knows the answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, noised, times, states):
        return type("Output", (), {"sample": self.answer})


@pytest.mark.parametrize("velocity", [False, True])
def test_the_denoisers_loss_is_zero_for_the_right_answer_only(velocity):
    torch.manual_seed(0)
    data = {"latents": torch.randn(8, 4, 8, 8), "noise": torch.randn(8, 4, 8, 8), "times": torch.arange(0, 1000, 125)}
    data["states"] = torch.zeros(8, 24, 384)
    kept = networks.build_scheduler().alphas_cumprod[data["times"]][:, None, None, None]
    right = kept.sqrt() * data["noise"] - (1 - kept).sqrt() * data["latents"] if velocity else data["noise"]
    assert denoiser_loss(velocity, Oracle(right), data) == 0
    assert denoiser_loss(velocity, Oracle(right + 0.1), data) > 1e-4


def test_the_two_parameterisations_weigh_alike():
    """min-SNR: a given error of x0 costs the same, whichever of noise and velocity is predicted."""
    torch.manual_seed(0)
    data = {"latents": torch.randn(64, 4, 8, 8), "noise": torch.randn(64, 4, 8, 8), "times": torch.arange(0, 960, 15)}
    data["states"] = torch.zeros(64, 24, 384)
    kept = networks.build_scheduler().alphas_cumprod[data["times"]][:, None, None, None]
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    noised = signal * data["latents"] + spread * data["noise"]
    wrong = data["latents"] + 0.1 * torch.randn_like(noised)  # a guess of x0
    noise = (noised - signal * wrong) / spread
    losses = [
        float(denoiser_loss(velocity, Oracle(signal * noise - spread * wrong if velocity else noise), data))
        for velocity in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_contrastive_loss_knows_which_captions_fit(drawings, tmp_path):
    """A caption without a style fits both drawings of its object; perfect scores reach the entropy of that choice."""
    workshop = Workshop(drawings, tmp_path)
    data = workshop._contrast(3)
    assert len(data.captions) == 128 and len(set(zip(data.objects.tolist(), data.styles.tolist(), strict=True))) == 128
    encoders = nn.ModuleDict(
        {"text": networks.build_text_encoder(workshop.tokenizer), "image": networks.ImageEncoder()}
    )
    loss = float(workshop._contrast_loss(encoders, data).detach())
    assert loss == pytest.approx(torch.tensor(128.0).log().item(), abs=0.6)
    again = workshop._contrast(3)
    assert torch.equal(again.images, data.images) and again.captions == data.captions


def test_the_learning_rate_rises_stays_and_falls():
    factors = [stages.warm_cosine(done, flat=0.4) for done in (0, 0.015, 0.03, 0.4, 0.7, 1.0)]
    assert factors[0] < 0.01 and factors[1] == pytest.approx(0.5, abs=0.01) and factors[2] == factors[3] == 1.0
    assert 0.4 < factors[4] < 0.6 and factors[5] == pytest.approx(0.02)


@pytest.mark.slow
def test_everything_runs_from_drawings_to_pipeline(drawings, tmp_path):
    """Two steps a stage: nothing is learnt, but every file is made, and a finished stage is not made again."""
    from conceptx.testbeds import emoji
    from conceptx.testbeds.emoji.shipping import draw, ship

    short = Schedule(text=2, autoencoder=2, judge=2, denoiser=2, batch=4, variations=1)
    workshop = Workshop(drawings, tmp_path / "work", short)
    ship(workshop, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    ship(Workshop(drawings, tmp_path / "work", short), tmp_path / "out")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    for unet in ("a", "b"):
        images = draw(emoji.load(unet, tmp_path / "out"), ["a noto dog"], [0], 2, 3.0)
        assert images.shape == (1, 3, 32, 32) and bool(images.isfinite().all())
    assert emoji.judges(tmp_path / "out").objects(images).shape == (1, len(OBJECTS) + 1)


def test_a_stopped_stage_goes_on_to_the_same_weights(drawings, tmp_path, monkeypatch):
    """The autoencoder's stage, stopped at the checkpoint of its second step."""
    short = Schedule(autoencoder=4)
    monkeypatch.setattr(stages, "CHECKPOINT_EVERY", 2)

    def weights(folder, stop_after=None):
        workshop = Workshop(drawings, folder, short)
        seen = workshop._any_images

        def images(step, count=32):
            if stop_after is not None and step >= stop_after and count == 32:
                raise KeyboardInterrupt
            return seen(step, 4 if count == 32 else 64)

        monkeypatch.setattr(Workshop, "_any_images", lambda self, *args: images(*args))
        try:
            return {name: tensor.clone() for name, tensor in workshop.autoencoder.state_dict().items()}
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(stages, "CHECKPOINT_EVERY", 2)

    whole = weights(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "cut", stop_after=3)
    resumed = weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
