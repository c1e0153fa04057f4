"""MACE: both closed forms are the published loops of every layer; what is trained, and on what; resume; behaviour."""

import dataclasses
import json
from functools import cache
from itertools import takewhile

import pytest
import torch
from benchmarks.published_mace import fused, refined
from hosts import CLIP_TOKENS, GARDEN, same, state, tiny_pipeline
from PIL import Image

from conceptx import Concept, Edit, load
from conceptx.demo.images import short_benchmark
from conceptx.edit import LowRank
from conceptx.evaluation.images import evaluate_images
from conceptx.methods import MACE, mace
from conceptx.methods.mace import OBJECT_TEMPLATES, STYLE_TEMPLATES, Fusion, aligned, inside, looks, timestep_weights
from conceptx.models.attention_maps import captured
from conceptx.places import tasks_folder
from conceptx.store import load_tensors
from conceptx.testbeds import emoji

FORMS = ("{}", "the {}", "{} under a tree", "we eat the {} and sing")
QUICK = MACE(templates=FORMS, ridge=0.3, images=2, sampling_steps=2, steps=2, learning_rate=1e-2)
CAT = Concept("cat", anchor="apple tree", retain=("bird", "iron"), retain_texts=GARDEN[1:4])
GOLD = Concept("gold", kind="style", retain=("bread",), retain_texts=(*GARDEN[4:], "tin and lead"))
# float64 sums of some 1e3 products of size 10, over a ridge of 0.3: 1e-16 becomes 1e-12; two digits of room.
CLOSE = {"rtol": 0, "atol": 1e-10}


def change(**fields):
    return dataclasses.replace(QUICK, **fields)


@cache
def sd1():
    """In float64, so that a prompt's rows do not depend on which others are encoded with it."""
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)
    return model


def encoded(text):
    return sd1().encode([text]).states[0]


def tensors(edit):
    return {f"{name}:{part}": t for name, delta in edit.deltas.items() for part, t in delta.tensors().items()}


def same_start(first, second):
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))])


def shared_rows(old, new):
    """(e_f, e_g) of two prompts by hand: equal ids from both ends, then the padding."""
    ids = [sd1().pipeline.tokenizer(text).input_ids for text in (old, new)]
    prefix = same_start(*ids)
    suffix = same_start(*(row[prefix:][::-1] for row in ids))
    tails = [encoded(text)[len(row) - suffix :] for text, row in zip((old, new), ids, strict=True)]
    count = min(map(len, tails))
    return [torch.cat([encoded(t)[:prefix], tail[:count]]) for t, tail in zip((old, new), tails, strict=True)]


def moments(texts):
    return sum(encoded(text).T @ encoded(text) for text in texts)


# -- theorems ------------------------------------------------------------------------------------------------------


def test_the_edit_is_the_published_loops_of_every_layer(tmp_path):
    """Stage 1, then stage 3 on the trained LoRAs, each layer by itself with sums of its own and explicit inverses."""
    weights = {"refine_captions": 0.7, "refine_names": 0.2, "fuse_captions": 5.0, "fuse_names": 3.0}
    edit = change(**weights).erase(sd1(), [CAT, GOLD], checkpoint=tmp_path)
    files = [load_tensors(path) for path in sorted(tmp_path.iterdir())]
    assert len(files) == 2 and set(edit.deltas) == {f"{path}.weight" for path in sd1().projections}
    prompts = {name: [form.format(name) for form in FORMS] for name in ("cat", "apple tree", "gold", "art")}
    pairs = [
        shared_rows(old, new)
        for c, anchor in (("cat", "apple tree"), ("gold", "art"))
        for old, new in zip(prompts[c], prompts[anchor], strict=True)
    ]
    captions = [*CAT.retain_texts, *GOLD.retain_texts]
    captions, names = moments(captions) / len(captions), moments(["bird", "iron", "bread"])
    for name, delta in edit.deltas.items():
        weight = sd1().parameter(name)
        start = refined(weight, pairs, 0.7 * captions + 0.2 * names, 1.0, 0.3)
        changes = [file[f"{name}:up"].double() @ file[f"{name}:down"].double() for file in files]
        concepts = [([encoded(p) for p in prompts[c]], dw) for c, dw in zip(("cat", "gold"), changes, strict=True)]
        wanted = fused(weight, start, concepts, 5.0 * captions + 3.0 * names, 1.0, 0.3)
        torch.testing.assert_close(delta.added_to(weight), wanted, **CLOSE)
        assert (start - weight).abs().max() > 1e-2 and (wanted - start).abs().max() > 1e-3
        if name.endswith("to_k.weight"):  # the values of the last layer change no attention
            assert min(float(c.abs().max()) for c in changes) > 1e-3


@pytest.mark.parametrize("out", [5, 40])
@pytest.mark.parametrize("count", [1, 10, 100])
def test_the_fusion_of_many_is_the_published_one(count, out):
    """Random rows, LoRAs of rank 2, weights wider and narrower than the text."""
    draw = torch.Generator().manual_seed(count)
    weight, change, prior = (torch.randn(n, 12, generator=draw).double() for n in (out, 12, 30))
    prior = prior.T @ prior
    rows = torch.randn(count, 3, 4, 12, generator=draw).double()
    loras = [LowRank(*(torch.randn(s, generator=draw).double() for s in ((out, 2), (2, 12)))) for _ in range(count)]
    fusion = Fusion(change, 0.5, 0.1 * prior)
    for block, lora in zip(rows, loras, strict=True):
        fusion.add(block.flatten(0, 1), {"layer.weight": lora})
    (delta,) = fusion.deltas(type("Plain", (), {"parameter": lambda _, name: weight})()).values()
    concepts = [(block, lora.up @ lora.down) for block, lora in zip(rows, loras, strict=True)]
    wanted = fused(weight, weight + weight @ change, concepts, prior, 0.1, 0.5)
    torch.testing.assert_close(weight + delta.up @ delta.down, wanted, **CLOSE)
    assert delta.up.shape[1] == min(out, 12)


def test_one_concept_and_no_prior_keep_what_its_lora_says():
    """Then nothing disagrees: W* is W' + b a on the concept's rows, as far as the ridge lets it."""
    draw = torch.Generator().manual_seed(0)
    weight, refined_by, rows = (torch.randn(n, 6, generator=draw).double() for n in (4, 6, 20))
    lora = LowRank(torch.randn(4, 1, generator=draw).double(), torch.randn(1, 6, generator=draw).double())
    fusion = Fusion(refined_by, 1e-9, torch.zeros(6, 6).double())
    fusion.add(rows, {"w": lora})
    (delta,) = fusion.deltas(type("Plain", (), {"parameter": lambda _, name: weight})()).values()
    torch.testing.assert_close(delta.up @ delta.down, weight @ refined_by + lora.up @ lora.down, rtol=0, atol=1e-7)


# -- which tokens --------------------------------------------------------------------------------------------------

BEGIN, END = 90, 91


@pytest.mark.parametrize(
    "first,second,places",
    [
        # a photo of [dog] in rain -> a photo of [cat] in rain
        ([1, 2, 3, 7, 4, 5], [1, 2, 3, 8, 4, 5], ([0, 1, 2, 3, 5, 6, 7, 8, 9], [0, 1, 2, 3, 5, 6, 7, 8, 9])),
        # [dog] runs -> [cat] runs: only the beginning token comes before
        ([7, 4], [8, 4], ([0, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 7, 8, 9])),
        # the [dog] -> the [polar bear]: two tokens for one, the padding of the shorter is cut
        ([1, 7], [1, 8, 9], ([0, 1, 3, 4, 5, 6, 7, 8], [0, 1, 4, 5, 6, 7, 8, 9])),
        ([1, 8, 9], [1, 7], ([0, 1, 4, 5, 6, 7, 8, 9], [0, 1, 3, 4, 5, 6, 7, 8])),
        # [sports car] -> [car]: the token that both have is at the end of both
        ([8, 9], [9], ([0, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8])),
        # the same prompt twice
        ([1, 2], [1, 2], ([*range(10)], [*range(10)])),
        # one token again and again is counted once: 1 1 -> 1 1 1
        ([1, 1], [1, 1, 1], ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 4, 5, 6, 7, 8, 9])),
    ],
)
def test_the_tokens_that_two_prompts_share(first, second, places):
    assert aligned([BEGIN, *first, END], [BEGIN, *second, END], 10) == places


def test_the_refinement_leaves_the_concepts_own_row_out():
    rows = mace.aligned_rows(sd1(), sd1().encode(["the cat under"]), sd1().encode(["the apple under"]))
    whole = encoded("the cat under")
    assert rows[0].shape == rows[1].shape == (CLIP_TOKENS - 2, whole.shape[1])
    gaps = [float((rows[0] - row).abs().sum(1).min()) for row in whole]
    # "cat" is token 2, "apple" has two tokens: one padding row is cut
    assert gaps[2] > 0.1 and gaps[-1] > 0.1 and max(gaps[:2] + gaps[3:-1]) < 1e-12
    torch.testing.assert_close(rows[0][:2], rows[1][:2])  # the encoder is causal


@pytest.mark.parametrize("kind,extra", [("sd1", [*range(6, CLIP_TOKENS)]), ("sd2", [6])])
def test_the_places_on_which_attention_is_unlearnt(kind, extra):
    model = tiny_pipeline(kind)
    asked = (model, "the apple tree under", "apple tree")  # begin, the, two tokens of apple, tree, under, end
    assert len(model.pipeline.tokenizer(asked[1]).input_ids) == 7
    assert mace.suppressed_rows(*asked, "name") == [2, 3, 4]
    assert mace.suppressed_rows(*asked, "name+end") == [2, 3, 4, *extra]  # SD 2 pads with another token


def test_templates_by_kind():
    assert len(set(OBJECT_TEMPLATES)) == len(set(STYLE_TEMPLATES)) == 30
    assert all(form.count("{}") == 1 for form in (*OBJECT_TEMPLATES, *STYLE_TEMPLATES))
    style = mace._Task.of(Concept("ink", kind="style"), ())
    assert style.prompts[0] == "a picture in the style of ink" and style.anchors[0] == "a picture in the style of art"
    assert mace._Task.of(Concept("Ada", kind="person"), ()).anchors[0] == "a photo of a person"
    assert mace._Task.of(Concept("cup", kind="object"), ("{}",)).anchors == ("a thing",)
    assert mace._Task.of(CAT, ("{}!",)).anchors == ("apple tree!",)


# -- what is trained -----------------------------------------------------------------------------------------------


def test_the_density_of_the_timesteps():
    weights = timestep_weights(1000, (200.0, 400.0), 0.05)
    assert bool((weights > 0).all()) and int(weights.argmax()) == 300
    # half of the top at both edges, flat between them, nothing early in the sampling (eq. 5)
    assert weights[[200, 400]].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert weights[250:351].min() > 0.9 and weights[600:].max() < 1e-4
    assert weights[150:451].sum() > 0.95 * weights.sum()
    torch.testing.assert_close(weights[1:600], weights[1:600].flip(0))
    assert bool((timestep_weights(50, None, 0.05) == 1).all())


def test_a_step_is_a_noisy_picture_at_the_level_of_its_timestep():
    model = tiny_pipeline()
    latents = model.noise([5, 6])
    scenes = mace._Scenes(model.encode(["the cat", "cat"]), [[2], [1]], latents, torch.ones(2, 1, 16, 16))
    steps = mace._Steps(QUICK, model, scenes, "key")
    times, texts = set(), set()
    for step in range(60):
        (part,) = steps.of(step)
        signal, spread = model.schedule.level(part.timestep)
        noise = min(
            ((part.latents - signal * picture) / spread for picture in latents), key=lambda e: float(e.square().mean())
        )
        assert 0.6 < float(noise.std()) < 1.4  # 256 numbers
        times.add(int(part.timestep))
        texts.add((part.prompt.texts[0], *part.tokens))
        assert torch.equal(part.latents, steps.of(step)[0].latents)
    assert texts == {("the cat", 2), ("cat", 1)} and len(times) > 30 and min(times) > 90 and max(times) < 510


def test_the_loss_by_hand():
    maps = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, False, True])
    chosen = [float(maps[0, head, pixel, token]) for head in range(2) for pixel in (0, 3) for token in (1, 2)]
    wanted = sum(value**2 for value in chosen)
    assert float(looks(maps, [1, 2], mask, True)) == pytest.approx(wanted)
    assert float(looks(maps, [1, 2], mask, False)) == pytest.approx(wanted**0.5)


def test_a_mask_at_the_size_of_a_layer():
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., 8:, :] = 1
    for pixels in (8 * 16, 4 * 8, 2 * 4):  # latents of 8 x 16 and two halvings
        small = inside(mask, (8, 16), pixels)
        rows = small.view(-1, 2 * int((pixels / 2) ** 0.5))
        assert small.dtype == torch.bool and rows.float().mean() == 0.5 and not rows[: len(rows) // 2].any()


def half_masked(folder, model, count=2):
    """Pictures of the pipeline's own size, and masks of their left halves."""
    folder.mkdir(exist_ok=True)
    side = model.latent_shape[1] * model.pipeline.vae_scale_factor
    draw = torch.Generator().manual_seed(0)
    images, masks = [], []
    for number in range(count):
        pixels = torch.randint(0, 255, (side, side, 3), generator=draw, dtype=torch.uint8).numpy()
        mask = Image.new("L", (side, side), 0)
        mask.paste(255, (0, 0, side // 2, side))
        for names, kind, image in ((images, "image", Image.fromarray(pixels)), (masks, "mask", mask)):
            names.append(str(folder / f"{kind}{number}.png"))
            image.save(names[-1])
    return {"images": images, "masks": masks}


@pytest.mark.parametrize("squared", [True, False])
def test_training_lowers_the_attention_on_the_concept_inside_the_mask(squared, tmp_path):
    """At timesteps, prompts and noise that the training has not seen."""
    model = tiny_pipeline()
    concept = Concept("cat", **half_masked(tmp_path, model))
    settings = change(steps=25, squared=squared, learning_rate=2e-2)
    task, prompts = mace._Task.of(concept, FORMS), model.encode([form.format("cat") for form in FORMS])
    trainer = mace._Trainer(settings, model, torch.zeros(32, 32).double(), 0, "run")
    learnt = Edit(model.fingerprint, deltas=trainer.deltas(task, prompts, None))
    steps = mace._Steps(settings, model, trainer._scenes(task, prompts, "other"), "other")
    parts = [part for step in range(10) for part in steps.of(step)]

    @torch.no_grad()
    def looked():
        return float(torch.stack([mace._loss(model, squared, model.denoiser, part) for part in parts]).mean())

    before = looked()
    with learnt.applied(model):
        assert looked() < 0.8 * before
    assert looked() == before and all(delta.up.shape[1] == 1 for delta in learnt.deltas.values())


def test_the_mask_decides_which_pixels_count(tmp_path):
    model = tiny_pipeline()
    fields = half_masked(tmp_path, model)
    concept, whole = Concept("cat", **fields), Concept("cat", images=fields["images"])
    prompts = model.encode([form.format("cat") for form in FORMS])
    losses = []
    for c in (concept, whole):
        trainer = mace._Trainer(QUICK, model, torch.zeros(32, 32).double(), 0, "run")
        (part,) = mace._Steps(QUICK, model, trainer._scenes(mace._Task.of(c, FORMS), prompts, "k"), "k").of(0)
        with torch.no_grad(), captured(model) as maps:
            model.predict(part.latents, part.timestep, part.prompt)
            losses.append(float(mace._loss(model, True, model.denoiser, part)))
        wanted = 0.0
        for found in maps.values():
            side = int(found.shape[2] ** 0.5)
            rows = found[0].unflatten(1, (side, side))
            seen = rows[:, :, : side // 2] if c is concept else rows
            wanted += float(seen[..., part.tokens].square().sum())
        assert losses[-1] == pytest.approx(wanted, rel=1e-5)
    assert losses[0] < losses[1]


def test_the_pictures_are_drawn_by_the_unedited_model(monkeypatch):
    model = tiny_pipeline()
    asked, generate = [], model.generate

    def draws(prompts, **options):
        asked.append((prompts, len(set(options["seeds"])), options["steps"], options["guidance"], len(model.applied)))
        return generate(prompts, **options)

    monkeypatch.setattr(model, "generate", draws)
    change(images=3, guidance=2.5).erase(model, [CAT, GOLD])
    assert asked == [(["cat"] * 3, 3, 2, 2.5, 0), (["gold"] * 3, 3, 2, 2.5, 0)]


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_host_stays_and_the_seed_decides(kind):
    model = tiny_pipeline(kind)
    before, random_state = state(model), torch.get_rng_state()
    one, again, other = (QUICK.erase(model, [CAT, GOLD], seed=seed) for seed in (0, 0, 1))
    assert same(before, state(model)) and torch.equal(random_state, torch.get_rng_state()) and not model.applied
    assert same(tensors(one), tensors(again)) and not same(tensors(one), tensors(other))
    assert not one.maps and all(delta.up.dtype == torch.float32 for delta in one.deltas.values())


def test_a_concepts_lora_does_not_depend_on_its_place(tmp_path):
    model = tiny_pipeline()
    found = []
    for name, concepts in (("a", [CAT, GOLD]), ("b", [GOLD, CAT])):
        QUICK.erase(model, concepts, checkpoint=tmp_path / name)
        files = [load_tensors(path) for path in sorted((tmp_path / name).iterdir())]
        found.append(files if name == "a" else files[::-1])
    for first, second in zip(*found, strict=True):
        # the refined weights are sums in another order; two steps of Adam on them
        assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first if k != "run")


def test_a_run_that_stops_goes_on_with_the_next_concept(tmp_path, monkeypatch):
    model, losses, loss = tiny_pipeline(), [], mace._loss
    before = state(model)

    def stops(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == QUICK.steps + 1:
            raise InterruptedError
        return losses[-1]

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(mace, "_loss", stops)
        QUICK.erase(model, [CAT, GOLD], checkpoint=tmp_path)
    assert same(before, state(model)) and not model.applied
    assert [path.name for path in tmp_path.iterdir()] == ["000.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(mace, "_loss", lambda *rest: losses.append(loss(*rest)) or losses[-1])
        resumed = QUICK.erase(model, [CAT, GOLD], checkpoint=tmp_path)
    assert len(losses) == QUICK.steps + 1 + QUICK.steps  # the second concept alone
    assert same(tensors(resumed), tensors(QUICK.erase(model, [CAT, GOLD])))
    for settings, concepts, seed in ((QUICK, [CAT, GOLD], 1), (change(steps=3), [CAT, GOLD], 0), (QUICK, [CAT], 0)):
        with pytest.raises(ValueError, match="checkpoint of another run"):
            settings.erase(model, concepts, seed=seed, checkpoint=tmp_path)


def test_other_pictures_are_another_run(tmp_path):
    model = tiny_pipeline()
    concept = Concept("cat", **half_masked(tmp_path / "pictures", model))
    QUICK.erase(model, concept, checkpoint=tmp_path / "run")
    QUICK.erase(model, concept, checkpoint=tmp_path / "run")
    Image.new("RGB", (16, 16), 7).resize(Image.open(concept.images[0]).size).save(concept.images[0])
    with pytest.raises(ValueError, match="checkpoint of another run"):
        QUICK.erase(model, concept, checkpoint=tmp_path / "run")


def test_half_precision():
    model = tiny_pipeline()
    model.pipeline.to(torch.bfloat16)
    edit = QUICK.erase(model, CAT)
    assert all(bool(t.isfinite().all()) and t.dtype == torch.float32 for t in tensors(edit).values())


@torch.no_grad()
def test_the_concept_moves_more_than_what_is_retained():
    model = tiny_pipeline()
    latents = model.noise(range(4))

    def noise(name):
        return model.predict(latents, 300.0, model.encode([name]))

    before = {name: noise(name) for name in ("cat", "bird")}
    with QUICK.erase(model, CAT).applied(model):
        moved = {name: float((noise(name) - old).norm()) for name, old in before.items()}
    assert moved["cat"] > 1.5 * moved["bird"]


# -- settings and wrong input --------------------------------------------------------------------------------------


def test_settings_survive_json():
    for eraser in (MACE(), QUICK, MACE(timesteps=None, tokens="name+end", squared=False)):
        assert MACE.from_settings(json.loads(json.dumps(dataclasses.asdict(eraser)))) == eraser


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"steps": 0, "rank": -1}, "rank, steps must be positive"),
        ({"fuse_names": -1.0, "refine_captions": float("inf")}, "refine_captions, fuse_names must be finite"),
        ({"templates": ("photo",)}, "must contain {} once"),
        ({"tokens": "all"}, "tokens must be one of name, name.end, got 'all'"),
        ({"timesteps": (400.0, 200.0)}, "first of the timesteps must be the smaller"),
        ({"guidance": float("nan")}, "guidance must be finite"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MACE(**settings)


@pytest.mark.parametrize(
    "kind,concepts,error,message",
    [
        ("sd3", CAT, ValueError, "no cross-attention maps"),
        ("flux", CAT, ValueError, "no cross-attention maps"),
        ("sd1", [], ValueError, "No concept was given"),
        ("sd1", [CAT, CAT], ValueError, "more than once: cat"),
        ("sd1", [CAT, Concept("bird")], ValueError, "retained as well: bird"),
        ("sd1", [Concept("cat", anchor="gold"), GOLD], ValueError, "an anchor as well: gold"),
        ("sd1", Concept("cat", retain=("gold " * 40,)), ValueError, "has 42 tokens"),
        ("sd1", Concept("cat", images=("no.png",)), FileNotFoundError, "There is no picture file"),
    ],
)
def test_a_wrong_task_is_one_clear_error_before_anything_changes(kind, concepts, error, message):
    model = tiny_pipeline(kind)
    before = state(model)
    with pytest.raises(error, match=message) as caught:
        QUICK.erase(model, concepts)
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and len(said) < 300
    assert same(before, state(model)) and not model.applied


def test_several_processes_are_refused(monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(ValueError, match="MACE trains in one process, there are 2"):
        QUICK.erase(tiny_pipeline(), CAT)


# -- on a trained model --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_dog_goes_and_the_others_stay():
    model, dog = load(emoji.NAME), Concept.load(tasks_folder() / "concepts" / "dog.toml")
    edit = MACE(guidance=emoji.GUIDANCE, sampling_steps=10, images=4, steps=10).erase(model, dog)
    suite = short_benchmark(dog)
    fewer = {"objects": (*suite.objects[:16], "castle"), "images": 12, "images_general": 1, "seed": 5}
    suite = suite.model_copy(update=fewer)
    found = evaluate_images(model, suite, emoji.judges(), dog, edit=edit)
    assert found["target", "Acc_e"].unedited >= 0.8 and found["target", "Acc_e"].value <= 0.1
    assert found["general", "Acc_g"].value < 0.5 * found["general", "Acc_g"].unedited
    assert found["others", "Acc_s"].value >= 0.9 * found["others", "Acc_s"].unedited
