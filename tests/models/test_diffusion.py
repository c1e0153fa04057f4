"""A pipeline seen through its wrapper, on tiny random pipelines of every architecture in the table."""

import copy
import math

import pytest
import torch
from hosts import CLIP_TOKENS, PIPELINES, T5_TOKENS, _unet, same, state, tiny, tiny_pipeline

from conceptx import Edit, wrap
from conceptx.edit import Dense, LowRank
from conceptx.geometry import ConceptMap
from conceptx.models import DiffusionModel

PROMPTS = ["gold and iron in the furnace", "a little bird sings"]
EXTRA = "xylophone"  # a word of several tokens
# Two orders of the same float32 sums through a denoiser, or a few steps of one: 1e-6 is seen on values of size 1.
ROUNDING = {"rtol": 0, "atol": 2e-5}
every = pytest.mark.parametrize("kind", PIPELINES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls_of(model, run):
    """The keyword arguments of every call of the denoiser while `run` is running."""
    seen = []
    hook = model.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


def plain(model, prompts, seeds, steps=3, **options):
    """What the pipeline does without the library."""
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    if model.architecture.tokenizer == "tokenizer_2" or hasattr(pipeline, "tokenizer_3"):
        options["max_sequence_length"] = T5_TOKENS
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        prompt=list(prompts), num_inference_steps=steps, generator=random, output_type="pt", **options
    ).images


def rank_one(model, site="text", mean=0.0):
    d = model.width(site)
    return ConceptMap(normal(d, 1, seed=1), normal(1, d, seed=2) / d**0.5, torch.full((d,), mean))


# -- sites ---------------------------------------------------------------------------------------------------------


def readers_by_search(model, states):
    """All linear layers that are called with these rows, found by hooks on every linear layer."""
    found, hooks = set(), []
    for name, module in model.module.named_modules():
        if name.startswith(model.denoiser_name) and isinstance(module, torch.nn.Linear):

            def look(_, args, name=name):
                if args[0].shape == states.shape and torch.equal(args[0], states):
                    found.add(name)

            hooks.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        model.predict(model.noise([0]), 500, model.encode(PROMPTS[:1]))
    for hook in hooks:
        hook.remove()
    return found


@every
def test_the_readers_are_all_layers_that_are_called_with_the_text(kind):
    model = tiny_pipeline(kind)
    prompts = model.encode(PROMPTS[:1])
    assert set(model.projections) == readers_by_search(model, prompts.states) and model.projections
    assert {model.parameter_shape(f"{path}.weight")[1] for path in model.projections} == {model.width("text")}
    assert prompts.states.shape[-1] == model.width("text")
    if "pooled" in model.sites:
        assert set(model.readers("pooled")) == readers_by_search(model, prompts.pooled)
        assert prompts.pooled.shape == (1, model.width("pooled"))


SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


@pytest.mark.parametrize(
    "unet,count,width",
    [
        ({"only_cross_attention": True}, 14, 32),  # self-attention reads the text as well (not in the middle)
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32, "cross_attention_dim": 24}, 1, 32),
        (SIMPLE, 8, 32),  # the text stands beside the image's own keys
        ({"dual_cross_attention": False, "transformer_layers_per_block": (3, 1)}, 20, 32),
    ],
)
def test_other_ways_in_which_a_unet_reads_text(unet, count, width):
    pipeline = tiny_pipeline("sd1").pipeline
    pipeline.unet = _unet(32, **unet).eval()
    model = wrap(pipeline)
    states = model.encode(PROMPTS[:1]).states
    assert set(model.projections) == readers_by_search(model, states)
    assert (len(model.projections), model.width("text")) == (count, width)


def changed(pipeline, part, **config):
    getattr(pipeline, part).register_to_config(**config)
    return pipeline


def without(pipeline, part):
    setattr(pipeline, part, None)
    return pipeline


def without_attention(pipeline):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    pipeline.unet = _unet(32, **blocks)
    return pipeline


def with_lora(pipeline):
    from peft import LoraConfig

    pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    return pipeline


def from_an_image(pipeline):
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)


def other_encoder(pipeline):
    pipeline.text_encoder = tiny("gpt2").module
    return pipeline


@pytest.mark.parametrize(
    "kind,change,message",
    [
        ("sd1", without_attention, "No layer of this UNet2DConditionModel reads the text"),
        (
            "sd1",
            lambda p: changed(p, "unet", addition_embed_type="image"),
            "addition_embed_type 'image'; known: UNet2DConditionModel, UNet2DConditionModel with addition_embed_type "
            "'text_time', SD3Transformer2DModel, FluxTransformer2DModel",
        ),
        ("sd1", lambda p: changed(p, "unet", encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type 'image_proj'"),
        ("sd1", lambda p: changed(p, "unet", quantization_config={"bits": 4}), "quantised; load it in float32"),
        ("sd1", lambda p: changed(p, "scheduler", prediction_type="score"), "prediction_type 'score'.*known: epsilon"),
        ("sd1", with_lora, "LoRA layers are loaded"),
        ("sd1", from_an_image, "StableDiffusionImg2ImgPipeline starts from an image"),
        ("sdxl", lambda p: without(p, "text_encoder"), "The pipeline has no text_encoder, by whose tokens"),
        ("flux", lambda p: without(p, "tokenizer_2"), "The pipeline has no tokenizer_2, by whose tokens"),
        ("sd1", other_encoder, "Unknown text encoder GPT2LMHeadModel; known: CLIPTextModel, "),
    ],
)
def test_what_the_library_does_not_know_is_refused(kind, change, message):
    pipeline = change(copy.copy(tiny_pipeline(kind).pipeline))
    with pytest.raises(ValueError, match=message):
        wrap(pipeline)


def test_an_unknown_denoiser_is_refused_by_name():
    pipeline = tiny_pipeline("sd3").pipeline
    pipeline.transformer = torch.nn.Linear(2, 2)
    pipeline.transformer.config = type("Config", (), {})()
    with pytest.raises(ValueError, match=r"Unknown denoiser Linear; known: UNet2DConditionModel, .*Flux"):
        wrap(pipeline)


@pytest.mark.parametrize(
    "ask,message",
    [
        (lambda m: m.width("txt"), "no site 'txt'; similar: text"),
        (lambda m: m.parameter("unet.conv_in.weights"), "similar: .*unet.conv_in.weight"),
        (lambda m: m.parameter("conv_in.weight"), "no parameter 'conv_in.weight'"),
        (lambda m: m.readers("pooled"), "no site 'pooled'; similar|available"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_what_there_is(ask, message):
    with pytest.raises(KeyError, match=message):
        ask(tiny_pipeline("sd1"))


def test_wrapping_keeps_the_pipeline_and_all_wrappers_know_the_edits_in_force():
    model = tiny_pipeline("sdxl")
    other = wrap(model.pipeline)
    assert other.pipeline is model.pipeline and wrap(model) is model and other.denoiser is model.pipeline.unet
    assert set(dict(model.module.named_children())) == {"unet", "text_encoder", "text_encoder_2"}
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="An edit is in force"):
        other.require_unedited()
    other.require_unedited()


# -- prompts -------------------------------------------------------------------------------------------------------


@every
def test_encode_gives_what_the_pipeline_gives_its_denoiser(kind):
    model = tiny_pipeline(kind)
    before = calls_of(model, lambda: plain(model, PROMPTS, [0, 1], steps=1))[0][1]
    prompts, nothing = model.encode(PROMPTS), model.unconditional(2)
    together = prompts if kind == "flux" else nothing + prompts
    torch.testing.assert_close(before["encoder_hidden_states"], together.states, **ROUNDING)
    pooled = before["added_cond_kwargs"]["text_embeds"] if kind == "sdxl" else before.get("pooled_projections")
    if pooled is not None:
        torch.testing.assert_close(pooled, together.pooled, **ROUNDING)
    assert (together.pooled is None) == (pooled is None) == (kind in ("sd1", "sd2"))


def numbering(model):
    """The tokenizer that numbers the rows, whether it begins with a special token, and the end token."""
    tokenizer = (
        model.pipeline.tokenizer_2 if type(model.pipeline).__name__ == "FluxPipeline" else model.pipeline.tokenizer
    )
    return tokenizer, int(tokenizer is model.pipeline.tokenizer), tokenizer.eos_token_id


@every
def test_one_convention_for_content_end_and_padding(kind):
    model = tiny_pipeline(kind)
    tokenizer, begin, end_token = numbering(model)
    texts = ["gold", f"a {EXTRA}, iron", "", "GOLD "]
    prompts = model.encode(texts)
    for number, text in enumerate(texts):
        ids = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids
        first, end = int(prompts.first[number]), int(prompts.end[number])
        assert first == begin and ids[end] == end_token and end_token not in ids[begin:end]
        said = tokenizer.decode(ids[first:end]).replace("</w>", "").replace(" ", "").casefold()
        assert kind == "flux" or said == text.replace(" ", "").casefold()  # T5 does not put all letters together again
    assert int(prompts.end[1]) > begin + 5  # the long word has several tokens
    rows = prompts.subject()
    assert torch.equal(rows[0], prompts.states[0, prompts.end[0] - 1])
    assert torch.equal(rows[1], prompts.states[1, prompts.end[1] - 1])
    assert torch.equal(rows[2], prompts.states[2, prompts.end[2]]) and prompts.first[2] == prompts.end[2]
    if begin:  # the begin token sees nothing of a prompt: its row is the same in all, and never a subject
        assert torch.equal(prompts.states[0, 0], prompts.states[2, 0])
        assert not torch.isclose(rows[2], prompts.states[2, 0]).all()


@every
def test_a_name_is_found_inside_a_prompt(kind):
    model = tiny_pipeline(kind)
    prompt = f"iron, {EXTRA} of Gold and gold rust"
    at = int(model.encode([f"iron, {EXTRA}"]).end[0]) - 1
    assert model.subject_end(prompt, EXTRA) == at
    assert model.subject_end(prompt, f"Iron, {EXTRA}") == at  # several words
    assert model.subject_end(prompt, "gold") == int(model.encode([f"iron, {EXTRA} of Gold and gold"]).end[0]) - 1
    for absent in ("phone", "xylo", "go", "", "a gold"):
        with pytest.raises(ValueError, match="does not hold"):
            model.subject_end(prompt, absent)


def test_pictures_that_are_not_finite_are_an_error():
    model = tiny_pipeline("sd1")
    name = "unet.conv_out.weight"
    broken = Edit(model.fingerprint, deltas={name: Dense(torch.full(model.parameter_shape(name), 3e38))})
    with broken.applied(model), pytest.raises(FloatingPointError, match="predictions of the model are not finite"):
        model.generate(["gold"], seeds=[0], steps=2)


@every
def test_a_prompt_that_would_be_cut_is_an_error(kind):
    model = tiny_pipeline(kind)
    fits = CLIP_TOKENS - 2
    assert model.encode(["gold " * fits]).end.tolist() == [fits if kind == "flux" else CLIP_TOKENS - 1]
    too_long = [("gold " * (fits + 1), rf"{CLIP_TOKENS + 1} tokens .* the tokenizer keeps {CLIP_TOKENS}")]
    if kind in ("sd3", "flux"):  # longer in the tokens of T5 than in those of CLIP
        too_long.append((f"{EXTRA} " * 3, rf"31 tokens .* the tokenizer_[23] keeps {T5_TOKENS}"))
    for text, message in too_long:
        with pytest.raises(ValueError, match=message):
            model.encode(["gold", text])
        with pytest.raises(ValueError, match=message):
            model.generate([text], seeds=[0])
    for wrong in ([], "gold"):
        with pytest.raises(ValueError, match="takes a list"):
            model.encode(wrong)


def test_no_gradient_unless_it_is_asked_for_and_the_modes_come_back():
    model = tiny_pipeline("sd1")
    model.module.train()
    model.pipeline.text_encoder.eval()
    modes = [part.training for part in model.module.modules()]
    assert not model.encode(PROMPTS).states.requires_grad
    model.encode(PROMPTS, differentiable=True).states.square().sum().backward()
    assert model.pipeline.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0
    model.generate(PROMPTS, seeds=[0, 1], steps=1)
    model.rollout(model.encode(PROMPTS), steps=3, stop=1, seeds=[0, 1], guidance=2.0)
    assert [part.training for part in model.module.modules()] == modes


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_many_prompts_are_encoded_in_batches(kind, monkeypatch):
    import conceptx.models.diffusion as module

    model = tiny_pipeline(kind)
    texts = ["gold", "iron and tin", "", "a cat", EXTRA]
    whole = model.encode(texts)
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 2)
    found = model.encode(texts)
    torch.testing.assert_close(found.states, whole.states, **ROUNDING)
    assert torch.equal(found.end, whole.end) and (found.pooled is None) == (kind == "sd1")
    if kind == "sdxl":
        torch.testing.assert_close(found.pooled, whole.pooled, **ROUNDING)


def test_prompts_are_selected_repeated_and_joined():
    prompts = tiny_pipeline("sdxl").encode(["gold", "iron and tin", ""])
    some = prompts.select([2, 0, 0])
    assert some.texts == ("", "gold", "gold") and torch.equal(some.states[1], prompts.states[0])
    assert torch.equal(some.end, prompts.end[[2, 0, 0]]) and torch.equal(some.pooled[0], prompts.pooled[2])
    assert prompts.repeat(2).texts == ("gold", "gold", "iron and tin", "iron and tin", "", "")
    assert (prompts + some).texts == prompts.texts + some.texts and len(prompts + some) == 6


# -- noise levels, by hand -----------------------------------------------------------------------------------------


def levels(model, timesteps):
    """(a, s) of timesteps, from the definitions of the two schedules."""
    if type(model.pipeline.scheduler).__name__.startswith("FlowMatch"):
        s = timesteps.double() / 1000
        return (1 - s).view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[timesteps.long()].view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


def trajectory(model, guidance, steps=5, seeds=(3, 4)):
    """Latents and timesteps before every step, and the latents at the end, as the pipeline itself makes them."""
    from diffusers import DDIMScheduler

    pipeline = copy.copy(model.pipeline)
    if type(pipeline).__name__ == "StableDiffusionXLPipeline":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    seen = [(None, None)]

    def keep(_, __, timestep, found):
        latents = found["latents"].clone()
        if latents.ndim == 3:
            latents = pipeline._unpack_latents(latents, 16, 16, pipeline.vae_scale_factor)
        seen.append((latents, timestep))
        return found

    cfg = {"guidance_scale": guidance} if type(pipeline).__name__ != "FluxPipeline" else {}
    plain_model = copy.copy(model)
    plain_model.pipeline = pipeline
    plain(plain_model, PROMPTS, seeds, steps=steps, callback_on_step_end=keep, **cfg)
    times = torch.stack([timestep for _, timestep in seen[1:]])
    return [latents for latents, _ in seen], times


@every
def test_a_rollout_is_the_way_of_the_pipeline_itself(kind):
    """Every `stop` from 0 (the pipeline's own starting noise) to the last, and two at once in one call."""
    model = tiny_pipeline(kind)
    guidance = 1.0 if kind == "flux" else 4.0  # FLUX has its guidance inside
    way, times = trajectory(model, guidance)
    prompts = model.encode(PROMPTS)
    start = torch.cat([torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    for stop, wanted in enumerate([start, *way[1:-1]]):
        latents, reached = model.rollout(prompts, steps=5, stop=stop, seeds=[3, 4], guidance=guidance)
        torch.testing.assert_close(latents, wanted, **ROUNDING)
        assert torch.equal(reached, times[stop].expand(2)) and latents.dtype == torch.float32
    latents, reached = model.rollout(prompts, steps=5, stop=[4, 1], seeds=[3, 4], guidance=guidance)
    torch.testing.assert_close(latents, torch.stack([way[4][0], way[1][1]]), **ROUNDING)
    assert torch.equal(reached, times[[4, 1]])
    one, _ = model.rollout(prompts.select([1]), steps=5, stop=2, seeds=[3, 4], guidance=guidance)
    torch.testing.assert_close(one[1], way[2][1], **ROUNDING)


@every
def test_predict_is_the_noise_with_which_the_pipeline_steps(kind):
    """One step of the pipeline, from the predicted noise and the definition of DDIM (flow: Euler)."""
    model = tiny_pipeline(kind)
    guidance = None if kind == "flux" else 4.0
    way, times = trajectory(model, guidance)
    with torch.no_grad():
        noise = model.predict(way[1], times[1], model.encode(PROMPTS), guidance=guidance).double()
    (a, s), (a_next, s_next) = levels(model, times[1:2]), levels(model, times[2:3])
    stepped = a_next * (way[1] - s * noise) / a + s_next * noise
    torch.testing.assert_close(stepped.float(), way[2], **ROUNDING)


@every
def test_predict_converts_what_the_denoiser_says_into_noise(kind):
    model = tiny_pipeline(kind)
    latents, times, prompts = normal(2, *model.latent_shape), torch.tensor([701, 201]), model.encode(PROMPTS)
    said = []
    hook = model.denoiser.register_forward_hook(lambda *call: said.append(call[-1][0]))
    with torch.no_grad():
        noise = model.predict(latents, times, prompts)
    hook.remove()
    (output,) = said
    if kind == "flux":
        output = model.pipeline._unpack_latents(output, 16, 16, model.pipeline.vae_scale_factor)
    a, s = (level.float() for level in levels(model, times))
    wanted = {"sd1": output, "sdxl": output, "sd2": a * output + s * latents}.get(kind, latents + a * output)
    torch.testing.assert_close(noise, wanted, **ROUNDING)
    assert noise.dtype == torch.float32 and noise.shape == latents.shape


@every
def test_guidance_is_the_identity_it_claims(kind):
    model = tiny_pipeline(kind)
    latents, prompts = normal(2, *model.latent_shape), model.encode(PROMPTS)
    with torch.no_grad():
        given, none = model.predict(latents, 401, prompts), model.predict(latents, 401, model.unconditional(2))
        assert (given - none).abs().max() > 1e-2
        for guidance in (0.0, 1.0, 3.0, -1.0):
            found = model.predict(latents, 401, prompts, guidance=guidance)
            torch.testing.assert_close(found, none + guidance * (given - none), **ROUNDING)
        alone = model.predict(latents[:1], torch.tensor([401]), prompts.select([0]))
        one_for_all = model.predict(latents, 401, prompts.select([0]))
    torch.testing.assert_close(alone, given[:1], **ROUNDING)
    torch.testing.assert_close(one_for_all[:1], given[:1], **ROUNDING)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sd3"])
@pytest.mark.parametrize("steps,stop", [(20, 0), (20, 1), (20, 10), (20, 19), (7, 6), (30, 13)])
def test_the_noise_level_of_a_latent_is_its_timestep(kind, steps, stop):
    """With a denoiser that knows the image x0, every latent of a rollout is a x0 + s e at its timestep."""
    model = tiny_pipeline(kind)
    image = normal(1, *model.latent_shape, seed=8).double()

    def perfect(_, __, given, ___):
        x = (given.get("sample") if kind != "sd3" else given["hidden_states"]).double()
        a, s = levels(model, given["timestep"])
        noise = (x - a * image) / s
        said = {"sd2": a * noise - s * image, "sd3": noise - image}.get(kind, noise)
        return (said.float(),)

    hook = model.denoiser.register_forward_hook(perfect, with_kwargs=True)
    latents, reached = model.rollout(model.encode(PROMPTS[:1]), steps=steps, stop=stop, seeds=[5, 6], guidance=1.0)
    hook.remove()
    _, times = model.rollout(model.encode(PROMPTS[:1]), steps=steps, stop=0, seeds=[5, 6], guidance=1.0)
    (a0, s0), (a, s) = levels(model, times), levels(model, reached)
    noise = (
        model.noise([5, 6]) - a0 * image
    ) / s0  # what of the starting noise is noise, at the level of the first step
    torch.testing.assert_close(latents.double(), a * image + s * noise, rtol=0, atol=2e-5)
    if stop == 0:
        assert torch.equal(latents, model.noise([5, 6]))
    assert reached.unique().numel() == 1 and (reached < times).all() == (stop > 0)


@pytest.mark.parametrize("stop", [5, -1, [1], [1, 2, 3], [1, 5]])
def test_a_rollout_stops_inside_its_steps(stop):
    model = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match=r"stop must be in 0\.\.4, one for each of the 2 seeds"):
        model.rollout(model.encode(PROMPTS), steps=5, stop=stop, seeds=[0, 1], guidance=1.0)


@pytest.mark.parametrize("timestep", [1000, -1, 10.5])
def test_a_timestep_outside_the_schedule_is_refused(timestep):
    model = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match="whole number from 0 to 999"):
        model.predict(normal(1, 4, 8, 8), timestep, model.encode(PROMPTS[:1]))


@every
def test_predict_is_differentiable_in_latents_prompts_and_weights(kind):
    model = tiny_pipeline(kind)
    model.denoiser.requires_grad_(False)
    weight = model.denoiser.get_parameter(f"{model.projections[0].partition('.')[2]}.weight").requires_grad_(True)
    latents = normal(1, *model.latent_shape).requires_grad_(True)
    prompts = model.encode(PROMPTS[:1])
    prompts.states.requires_grad_(True)
    model.predict(latents, 500, prompts, guidance=2.0).square().mean().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (weight, latents, prompts.states))


def test_the_schedule_follows_the_pipelines_scheduler():
    from diffusers import DDIMScheduler

    model = tiny_pipeline("sd1")
    assert model.schedule.kind == "epsilon"
    model.pipeline.scheduler = DDIMScheduler.from_config(
        model.pipeline.scheduler.config, prediction_type="v_prediction"
    )
    assert model.schedule.kind == "v_prediction"


def test_a_scheduler_that_clips_its_image_is_followed():
    model = tiny_pipeline("sd1")
    model.pipeline.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.5)
    way, _ = trajectory(model, 4.0)
    latents, _ = model.rollout(model.encode(PROMPTS), steps=5, stop=4, seeds=[3, 4], guidance=4.0)
    torch.testing.assert_close(latents, way[4], **ROUNDING)


# -- images --------------------------------------------------------------------------------------------------------


@every
def test_generate_is_the_pipeline_whatever_the_batch(kind):
    model = tiny_pipeline(kind)
    prompts, seeds = [*PROMPTS, PROMPTS[0], ""], [7, 8, 9, 7]
    images = model.generate(prompts, seeds=seeds, steps=3)
    wanted = torch.cat([plain(model, [p], [s]) for p, s in zip(prompts, seeds, strict=True)])
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    torch.testing.assert_close(images, wanted, **ROUNDING)
    torch.testing.assert_close(model.generate(prompts, seeds=seeds, steps=3, batch_size=3), images, **ROUNDING)
    assert (images[0] - images[2]).abs().max() > 0.05  # another seed
    assert (images[0] - images[3]).abs().max() > 0.01  # another prompt


def test_guidance_comes_from_the_call_the_model_or_the_pipeline():
    model = tiny_pipeline("sd1")
    set_to_two = DiffusionModel(model.pipeline, guidance=2.0)
    two, default = (plain(model, PROMPTS, [0, 1], **g) for g in ({"guidance_scale": 2.0}, {}))
    for found, wanted in [
        (set_to_two.generate(PROMPTS, seeds=[0, 1], steps=3), two),
        (model.generate(PROMPTS, seeds=[0, 1], steps=3, guidance=2.0), two),
        (set_to_two.generate(PROMPTS, seeds=[0, 1], steps=3, guidance=7.5), default),
        (model.generate(PROMPTS, seeds=[0, 1], steps=3), default),
    ]:
        torch.testing.assert_close(found, wanted, **ROUNDING)
    assert (two - default).abs().max() > 0.01


def test_options_are_shared_out_and_an_edits_arguments_added():
    model = tiny_pipeline("sd1")
    negative = ["iron", "a cat"]
    wanted = torch.cat(
        [plain(model, [p], [s], negative_prompt=[n]) for p, s, n in zip(PROMPTS, [0, 1], negative, strict=True)]
    )
    found = model.generate(PROMPTS, seeds=[0, 1], steps=3, batch_size=1, negative_prompt=negative)
    torch.testing.assert_close(found, wanted, **ROUNDING)
    before = model.generate(PROMPTS, seeds=[0, 1], steps=3)
    with Edit(model.fingerprint, generation={"negative_prompt": "iron"}).applied(model):
        one = model.generate(PROMPTS, seeds=[0, 1], steps=3)
    torch.testing.assert_close(one[0], wanted[0], **ROUNDING)
    assert (one - before).abs().max() > 0.01
    assert torch.equal(model.generate(PROMPTS, seeds=[0, 1], steps=3), before)


def test_generating_reports_progress_and_leaves_the_pipelines_bar_as_it_was(capfd):
    from conceptx.progress import heard_by

    model, heard = tiny_pipeline("sd1"), []
    assert not hasattr(model.pipeline, "_progress_bar_config")
    with heard_by(lambda what, done, total, _: heard.append((what, done, total))):
        model.generate(PROMPTS * 2, seeds=range(4), steps=1, batch_size=3)
    assert heard == [("images", 0, 2), ("images", 1, 2), ("images", 2, 2)]
    assert not hasattr(model.pipeline, "_progress_bar_config") and capfd.readouterr() == ("", "")
    model.pipeline.set_progress_bar_config(desc="mine")
    model.generate(PROMPTS, seeds=[0, 1], steps=1)
    assert model.pipeline._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("prompts,seeds", [([], []), (["gold"], [1, 2]), ("gold", [1, 2, 3, 4])])
def test_prompts_and_seeds_must_agree(prompts, seeds):
    with pytest.raises(ValueError, match="takes a list of prompts and as many seeds"):
        tiny_pipeline("sd1").generate(prompts, seeds=seeds)


@every
def test_latents_become_the_pipelines_own_images_and_back(kind):
    model = tiny_pipeline(kind)
    if kind == "sdxl":
        model.pipeline.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    way, _ = trajectory(model, 4.0)
    guidance = {} if kind == "flux" else {"guidance_scale": 4.0}
    if kind != "sdxl":  # (its own scheduler is not the one of the trajectory)
        torch.testing.assert_close(
            model.to_images(way[-1]), plain(model, PROMPTS, [3, 4], steps=5, **guidance), **ROUNDING
        )
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = model.to_latents(images)
    assert latents.shape == (2, *model.latent_shape) and latents.dtype == torch.float32
    vae, with_mean = model.pipeline.vae, model.to_latents(images)
    mean = vae.encode(images * 2 - 1).latent_dist.mean.detach()
    seen = []
    hook = vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.to_images(with_mean)
    vae.decode(mean)
    hook.remove()
    torch.testing.assert_close(*seen, **ROUNDING)  # the decoder gets back what the encoder said


def test_bfloat16_all_the_way():
    model = tiny_pipeline("sd2")
    model.pipeline.to(dtype=torch.bfloat16)
    prompts = model.encode(PROMPTS)
    with torch.no_grad():
        noise = model.predict(model.noise([0, 1]), 500, prompts, guidance=3.0)
    latents, _ = model.rollout(prompts, steps=4, stop=3, seeds=[0, 1], guidance=3.0)
    images = model.generate(PROMPTS, seeds=[0, 1], steps=2)
    assert model.dtype == prompts.states.dtype == torch.bfloat16
    assert noise.dtype == latents.dtype == images.dtype == torch.float32
    assert all(bool(t.isfinite().all()) for t in (noise, latents, images))
    torch.testing.assert_close(model.to_images(model.to_latents(images)).shape, images.shape)


# -- edits ---------------------------------------------------------------------------------------------------------


def fully_edited(model):
    """A map at every site that can be folded, and changes of denoiser and text encoder."""
    maps = {name: (rank_one(model, name, mean=0.1),) for name, site in model.sites.items() if site.readers}
    deltas = {}
    for name in (
        next(
            n
            for n in dict(model.module.named_parameters())
            if n.startswith("text_encoder.encoder") or ".layers.0.self_attn.q_proj.weight" in n
        ),
    ):
        deltas[name] = Dense(0.1 * normal(*model.parameter_shape(name), seed=4))
    for name in [f"{path}.weight" for path in model.projections[:2]]:
        out, inside = model.parameter_shape(name)
        deltas[name] = LowRank(normal(out, 2, seed=5) / 4, normal(2, inside, seed=6) / 4)
    return Edit(model.fingerprint, maps=maps, deltas=deltas)


@every
def test_a_map_and_its_fold_give_the_same_image(kind):
    model = tiny_pipeline(kind)
    maps = {
        name: (rank_one(model, name, mean=0.1), rank_one(model, name)) for name, s in model.sites.items() if s.readers
    }
    edit = Edit(model.fingerprint, maps=maps)
    folded = edit.fold(model)
    assert not folded.maps and {n.removesuffix(".weight") for n in folded.deltas if n.endswith("weight")} == {
        reader for site in maps for reader in model.readers(site)
    }
    plain_images = model.generate(PROMPTS, seeds=[0, 1], steps=3)
    with edit.applied(model):
        mapped = model.generate(PROMPTS, seeds=[0, 1], steps=3)
    with folded.applied(model):
        torch.testing.assert_close(model.generate(PROMPTS, seeds=[0, 1], steps=3), mapped, rtol=0, atol=1e-4)
    assert (mapped - plain_images).abs().max() > 0.02


def test_the_pooled_vector_of_sdxl_takes_a_map_that_stays_one():
    model = tiny_pipeline("sdxl")
    edit = Edit(model.fingerprint, maps={"pooled": (rank_one(model, "pooled"),)})
    assert edit.fold(model).maps.keys() == {"pooled"} and model.readers("pooled") == ()
    latents, prompts = model.noise([0]), model.encode(PROMPTS[:1])
    with torch.no_grad():
        before = model.predict(latents, 500, prompts)
        with edit.applied(model):
            found = model.predict(latents, 500, prompts)
        by_hand = copy.copy(prompts)
        object.__setattr__(by_hand, "pooled", edit.maps["pooled"][0](prompts.pooled))
        torch.testing.assert_close(found, model.predict(latents, 500, by_hand), **ROUNDING)
    assert (found - before).abs().max() > 1e-3


def test_a_map_acts_however_the_denoiser_is_called():
    model = tiny_pipeline("sd1")
    latents, states = model.noise([0]), model.encode(PROMPTS[:1]).states
    concept_map = rank_one(model)
    hook = model.install("text", concept_map)
    with torch.no_grad():
        by_place = model.denoiser(latents, 500, states).sample
        by_name = model.denoiser(latents, timestep=500, encoder_hidden_states=states).sample
        hook.remove()
        wanted = model.denoiser(latents, 500, concept_map(states)).sample
    assert torch.equal(by_place, by_name) and torch.equal(by_name, wanted)


@every
def test_apply_and_undo_are_bit_identical(kind):
    model = tiny_pipeline(kind)
    before, said = state(model), model.generate(PROMPTS, seeds=[0, 1], steps=2)
    edit = fully_edited(model)
    for one in (edit, edit.fold(model)):
        with one.applied(model):
            assert (model.generate(PROMPTS, seeds=[0, 1], steps=2) - said).abs().max() > 0.01
        assert same(before, state(model))
        assert torch.equal(model.generate(PROMPTS, seeds=[0, 1], steps=2), said)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.denoiser.modules())


@every
def test_saved_and_loaded_does_the_same_and_only_to_its_own_pipeline(kind, tmp_path):
    model = tiny_pipeline(kind)
    edit = fully_edited(model)
    edit.save(tmp_path)
    loaded = Edit.load(tmp_path)
    with edit.applied(model):
        wanted = model.generate(PROMPTS, seeds=[0, 1], steps=2)
    with loaded.applied(tiny_pipeline(kind)) as handle:
        assert torch.equal(handle._model.generate(PROMPTS, seeds=[0, 1], steps=2), wanted)
    for other in (tiny_pipeline(kind, seed=1), tiny_pipeline("sd1" if kind == "sd3" else "sd3")):
        with pytest.raises(ValueError, match="made for another model"):
            loaded.apply(other)
    encoder = tiny_pipeline(kind)  # the fingerprint covers the text encoders too
    with torch.no_grad():
        encoder.pipeline.text_encoder.get_input_embeddings().weight.add_(1)
    with pytest.raises(ValueError, match="sampled weights differ"):
        loaded.apply(encoder)


@every
def test_plain_diffusers_loads_the_merged_pipeline(kind, tmp_path):
    from conceptx import load

    model = tiny_pipeline(kind)
    before = state(model)
    maps = {name: (rank_one(model, name),) for name, site in model.sites.items() if site.readers}
    edit = Edit(model.fingerprint, maps=maps)
    model.save_pretrained(tmp_path / "merged", edit)
    assert same(before, state(model))
    loaded = load(str(tmp_path / "merged"))
    loaded.pipeline.default_sample_size = 8  # FluxPipeline does not save its own
    with edit.applied(model):
        wanted = model.generate(PROMPTS, seeds=[0, 1], steps=3)
    torch.testing.assert_close(plain(loaded, PROMPTS, [0, 1]), wanted, rtol=0, atol=1e-4)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".txt",
        ".jinja",
    }


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path):
    model = tiny_pipeline("sd1")
    with pytest.raises(
        ValueError, match=r"no place for the bias unet\.down_blocks.*to_k\.bias; erase with a zero mean"
    ):
        model.save_pretrained(tmp_path / "m", Edit(model.fingerprint, maps={"text": (rank_one(model, mean=0.1),)}))
    xl = tiny_pipeline("sdxl")
    with pytest.raises(ValueError, match=r"The maps at \['pooled'\] cannot be folded"):
        xl.save_pretrained(tmp_path / "m", Edit(xl.fingerprint, maps={"pooled": (rank_one(xl, "pooled"),)}))
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="An edit is in force"):
        model.save_pretrained(tmp_path / "m", Edit(model.fingerprint))
    assert not list(tmp_path.iterdir())
