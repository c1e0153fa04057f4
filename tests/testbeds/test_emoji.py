"""The emoji testbed as it ships: small, safe, an ordinary pipeline, and good enough to judge erasers on."""

import pytest
import torch

from conceptx.testbeds import emoji
from conceptx.testbeds.emoji import networks, shipping
from conceptx.testbeds.emoji.drawings import stamped

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SAMPLE = range(0, len(emoji.OBJECTS), 7)  # every seventh object
STYLES = len(emoji.STYLE_NAMES)


@pytest.fixture(scope="module")
def pipeline():
    return emoji.load()


@pytest.fixture(scope="module")
def court():
    return emoji.judges()


def shares(court, images, objects, styles):
    found = shipping.measure(images, objects, styles, None)
    return found["object_accuracy"], found["style_accuracy"]


def test_what_ships_is_small_and_holds_no_code():
    files = [path for path in emoji.folder().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 35e6
    assert all(style.licence in (emoji.folder() / "ATTRIBUTION.md").read_text() for style in emoji.STYLES)


def test_the_tokenizer_is_the_one_that_the_captions_give():
    """Its numbering must not depend on the process that learns it: each stage of the training learns it again."""
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(emoji.folder() / "tokenizer")
    built = networks.build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped(list(emoji.OBJECT_NAMES))["input_ids"] == built(list(emoji.OBJECT_NAMES))["input_ids"]


def test_the_judges_know_every_drawing_that_no_training_saw(court):
    images = torch.cat([emoji.examples(name) for name in emoji.OBJECT_NAMES])
    objects = torch.arange(len(emoji.OBJECTS)).repeat_interleave(STYLES)
    styles = torch.arange(STYLES).repeat(len(emoji.OBJECTS))
    object_accuracy, style_accuracy = shares(court, images, objects, styles)
    assert object_accuracy >= 0.98 and style_accuracy >= 0.98
    assert ((court.watermark(images) > 0.5).float().mean() < 0.02) and (
        court.watermark(stamped(images)) > 0.5
    ).float().mean() > 0.98
    weapon = torch.tensor([thing.group == "weapon" for thing in emoji.OBJECTS])[objects]
    assert ((court.unsafe(images) > 0.5) == weapon).float().mean() >= 0.98


def test_the_judges_call_noise_and_emptiness_none_of_these(court):
    torch.manual_seed(0)
    mush = torch.cat([torch.rand(50, 3, 32, 32), torch.ones(5, 3, 32, 32), torch.zeros(5, 3, 32, 32)])
    assert (court.objects(mush).argmax(1) == len(emoji.OBJECTS)).float().mean() > 0.9


def test_the_small_clip_finds_the_caption_of_a_picture(court):
    names = emoji.OBJECT_NAMES
    images = torch.stack([emoji.examples(name)[i % STYLES] for i, name in enumerate(names)])
    texts = court.embed_texts([emoji.fill("a {s} {o}", n, emoji.STYLE_NAMES[i % STYLES]) for i, n in enumerate(names)])
    found = (court.embed_images(images) @ texts.T).argmax(1)
    assert (found == torch.arange(len(names))).float().mean() > 0.95
    with pytest.raises(ValueError, match="3 pictures need as many texts, got 1"):
        court.similarity(images[:3], ["a dog"])


def test_the_pipeline_draws_what_it_is_asked_for(pipeline, court):
    """A seventh of the objects, one picture a cell; `make test-slow` draws them all."""
    cells = [(o, s) for o in SAMPLE for s in range(STYLES)]
    prompts = [emoji.fill("a {s} {o}", emoji.OBJECT_NAMES[o], emoji.STYLE_NAMES[s]) for o, s in cells]
    images = shipping.draw(pipeline, prompts, range(len(cells)), emoji.STEPS, emoji.GUIDANCE)
    objects, styles = (torch.tensor(column) for column in zip(*cells, strict=True))
    object_accuracy, style_accuracy = shares(court, images, objects, styles)
    assert object_accuracy > 0.9 and style_accuracy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("unet", emoji.UNETS)
def test_the_bar_over_all_objects_and_styles(unet):
    images, objects, styles = shipping.draw_all(unet, None, 5, emoji.STEPS, emoji.GUIDANCE)
    found = shipping.measure(images, objects, styles, None)
    assert found["object_accuracy"] >= 0.95 and found["style_accuracy"] >= 0.95
    assert min(found["weakest"].values(), default=1.0) >= 0.7


def test_the_two_denoisers_share_the_text_encoder_and_nothing_else(pipeline):
    other = emoji.load("b")
    first, second = pipeline.text_encoder.state_dict(), other.text_encoder.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert other.scheduler.config.prediction_type == "v_prediction"
    assert not torch.equal(pipeline.unet.conv_in.weight, other.unet.conv_in.weight)
    with pytest.raises(ValueError, match="no denoiser 'c'; available: a, b"):
        emoji.load("c")


# -- an ordinary pipeline ----------------------------------------------------------------------------------------


def drawn(pipeline, prompt="a noto dog", steps=8, **options):
    generator = torch.Generator().manual_seed(3)
    return pipeline(
        prompt, num_inference_steps=steps, guidance_scale=3.0, generator=generator, output_type="pt", **options
    ).images


def test_it_saves_and_loads_as_any_other(pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert torch.equal(drawn(again), drawn(pipeline))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_other_schedulers_draw_a_dog_too(pipeline, court, name):
    import diffusers

    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(before.config)
    try:
        said = court.objects(drawn(pipeline, steps=15)).argmax(1)
    finally:
        pipeline.scheduler = before
    assert emoji.OBJECT_NAMES[int(said)] == "dog"


def test_image_to_image_works(pipeline, court):
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    changer = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    changer.set_progress_bar_config(disable=True)
    start = emoji.examples("cat")[:1]
    made = drawn(changer, "a noto cat", steps=20, image=start * 2 - 1, strength=0.5)
    assert emoji.OBJECT_NAMES[int(court.objects(made).argmax(1))] == "cat"


@torch.no_grad()
def test_an_image_can_be_inverted_and_drawn_again(pipeline):
    """DDIM up and down again with the picture's own caption gives the picture back."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    states = pipeline.encode_prompt("a noto cat", "cpu", 1, False)[0]
    start = pipeline.vae.encode(emoji.examples("cat")[:1] * 2 - 1).latent_dist.mean
    latents = start
    for kind in (DDIMInverseScheduler, DDIMScheduler):
        scheduler = kind.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        for timestep in scheduler.timesteps:
            noise = pipeline.unet(latents, timestep, encoder_hidden_states=states).sample
            latents = scheduler.step(noise, timestep, latents).prev_sample
        if kind is DDIMInverseScheduler:
            assert (latents - start).abs().mean() > 0.5  # it is noise now
    again, picture = (pipeline.vae.decode(x).sample / 2 + 0.5 for x in (latents, start))
    assert (again - picture).abs().mean() < 0.05
