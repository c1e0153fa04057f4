"""ESD: its target by hand, what it trains and what it leaves alone, and runs that stop and go on."""

import dataclasses
import gc
import json
from contextlib import contextmanager

import pytest
import torch
from hosts import same, state, tiny_pipeline

from conceptx import Concept, Edit
from conceptx.methods import ESD, esd
from conceptx.train.loop import Plan

COPPER = Concept("copper", synonyms=("brass",))
QUICK = ESD(steps=2, batch_size=2, sampling_steps=3, learning_rate=1e-3)
KINDS = ("sd1", "sdxl", "sd3")
# The same sums in batches of another size: float32, predictions of size 1, a few layers.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}

every = pytest.mark.parametrize("kind", KINDS)
both_forms = pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])


def change(settings=QUICK, **fields):
    return dataclasses.replace(settings, **fields)


@contextmanager
def steps_of(model, settings, concept=COPPER, seed=0):
    """The steps of a run and its student, before the first step."""
    asked = esd._Asked.of(model, settings._phrases([concept]), settings.erase_from)
    with settings._student(model, esd.chosen(model, settings.variant), seed) as student:
        yield esd._Steps(settings, model, student, asked, seed), student


def start(model, settings, **more):
    """(rows of the first step, their loss) before anything is learnt."""
    with steps_of(model, settings, **more) as (steps, _), torch.no_grad():
        (rows,) = steps.of(0)
        return rows, esd._loss(model, model.denoiser, rows)


@torch.no_grad()
def noises(model, rows):
    """(e0, ep) of the model as it is, one latent at a time."""
    empty = model.unconditional()
    found = [
        (model.predict(x[None], t, empty), model.predict(x[None], t, rows.prompts.select([n])))
        for n, (x, t) in enumerate(zip(rows.latents, rows.timesteps, strict=True))
    ]
    return tuple(torch.cat(kind) for kind in zip(*found, strict=True))


def tensors(edit):
    return {f"{name}:{part}": t for name, delta in edit.deltas.items() for part, t in delta.tensors().items()}


# -- theorems of the target (spec, section 7) ----------------------------------------------------------------------


@every
@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_at_the_start_the_loss_is_the_squared_guidance_times_one_plus_eta_squared(kind, eta):
    model = tiny_pipeline(kind)
    rows, loss = start(model, change(negative_guidance=eta))
    neutral, concept = noises(model, rows)
    wanted = (1 + eta) ** 2 * (concept - neutral).square().mean()
    assert wanted > 1e-5
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)


@every
def test_eta_minus_one_is_the_model_itself_and_eta_zero_is_no_prompt(kind):
    model = tiny_pipeline(kind)
    rows, loss = start(model, change(negative_guidance=-1.0))
    _, concept = noises(model, rows)
    torch.testing.assert_close(rows.target, concept, **ROUNDING)
    assert loss < 1e-9  # rounding, squared
    rows, _ = start(model, change(negative_guidance=0.0))
    neutral, concept = noises(model, rows)
    torch.testing.assert_close(rows.target, neutral, **ROUNDING)
    assert (concept - neutral).abs().max() > 1e-2


def test_erasing_from_a_broader_prompt_by_hand():
    """The code of 2025: e_from - eta_code (e_erase - e_null) with eta_code = 1 + eta; the student is asked for from."""
    model = tiny_pipeline()
    rows, _ = start(model, change(erase_from="gold and copper", negative_guidance=1.5), concept=Concept("copper"))
    assert set(rows.prompts.texts) == {"gold and copper"}
    neutral, broader = noises(model, rows)
    concept = torch.cat(
        [
            model.predict(x[None], t, model.encode(["copper"])).detach()
            for x, t in zip(rows.latents, rows.timesteps, strict=True)
        ]
    )
    torch.testing.assert_close(rows.target, broader - 2.5 * (concept - neutral), **ROUNDING)


def test_erasing_from_the_concept_itself_is_the_papers_target():
    plain, _ = start(tiny_pipeline(), QUICK, concept=Concept("copper"))
    named, _ = start(tiny_pipeline(), change(erase_from="copper"), concept=Concept("copper"))
    assert torch.equal(plain.latents, named.latents)
    torch.testing.assert_close(plain.target, named.target, **ROUNDING)


# -- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_each_variant_trains_in_a_unet(kind):
    model = tiny_pipeline(kind)
    everything = [name for name, _ in model.denoiser.named_parameters()]
    x, u, full, strict = (esd.chosen(model, variant) for variant in ("x", "u", "full", "x-strict"))
    assert full == everything and x == [name for name in everything if ".attn2." in name] and len(x) > 3
    assert {f"unet.{name}" for name in strict} == {f"{path}.weight" for path in model.projections}
    ends = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")
    assert u == [name for name in everything if name not in x and not name.startswith(ends)]
    trained = ("conv_in.weight", ".norm2.weight", ".time_emb_proj.weight", ".attn1.to_q.weight", ".ff.net.2.weight")
    assert all(any(name.endswith(end) for name in u) for end in trained)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_what_each_variant_trains_in_a_joint_attention(kind):
    model = tiny_pipeline(kind)
    everything = [name for name, _ in model.denoiser.named_parameters()]
    x, u, full, strict = (esd.chosen(model, variant) for variant in ("x", "u", "full", "x-strict"))
    assert full == everything and not set(x) & set(u)
    assert {name.split(".")[3] for name in strict} == {"add_k_proj", "add_v_proj"}
    assert {name.split(".")[3] for name in x} >= {"add_q_proj", "add_k_proj", "add_v_proj"}
    left = {name.split(".")[0] for name in set(everything) - set(x) - set(u)}
    assert left == {"time_text_embed", "context_embedder", "norm_out", "proj_out"}


@pytest.mark.parametrize("kind,variant", [("sd1", "x"), ("sdxl", "u"), ("sd3", "x-strict"), ("flux", "full")])
def test_the_edit_holds_exactly_the_trained_parameters(kind, variant):
    model = tiny_pipeline(kind)
    before = state(model)
    edit = change(variant=variant).erase(model, COPPER)
    names = [f"{model.denoiser_name}.{name}" for name in esd.chosen(model, variant)]
    assert list(edit.deltas) == names and all(delta.kind == "dense" for delta in edit.deltas.values())
    assert sum(bool(tensor.any()) for tensor in tensors(edit).values()) > 0.8 * len(names)
    with edit.applied(model):
        changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
        assert changed and changed <= set(names)
    assert same(before, state(model))


@pytest.mark.parametrize("kind,variant", [("sd1", "x"), ("sd3", "u")])
def test_an_adapter_sits_on_the_linear_layers_among_them(kind, variant):
    model = tiny_pipeline(kind)
    edit = change(variant=variant, rank=2).erase(model, COPPER)
    chosen = (f"{model.denoiser_name}.{name}" for name in esd.chosen(model, variant))
    assert set(edit.deltas) == {name for name in chosen if model.takes_adapter(name)}
    assert all(delta.kind == "low_rank" and delta.down.shape[0] == 2 for delta in edit.deltas.values())
    assert all(bool(delta.up.any()) for delta in edit.deltas.values())


# -- one denoiser ----------------------------------------------------------------------------------------------------


@both_forms
def test_the_host_stays_and_the_seed_decides(rank):
    model = tiny_pipeline()
    model.denoiser.train()
    first = next(model.denoiser.parameters())
    first.requires_grad_(False)
    next(model.pipeline.text_encoder.parameters()).grad = None
    last = list(model.denoiser.parameters())[-1]
    last.grad = torch.ones_like(last)
    before, random_state = state(model), torch.get_rng_state()
    places = {name: p.data_ptr() for name, p in model.denoiser.named_parameters()}
    modes = [part.training for part in model.module.modules()]
    one, again, other = (change(rank=rank).erase(model, COPPER, seed=seed) for seed in (0, 0, 1))
    assert same(before, state(model)) and places == {n: p.data_ptr() for n, p in model.denoiser.named_parameters()}
    assert not first.requires_grad and all(p.requires_grad for p in list(model.denoiser.parameters())[1:])
    assert modes == [part.training for part in model.module.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    if rank is None:
        assert torch.equal(last.grad, torch.ones_like(last))
        assert all(p.grad is None for p in list(model.denoiser.parameters())[:-1])
    assert same(tensors(one), tensors(again)) and not same(tensors(one), tensors(other))


@both_forms
def test_the_host_stays_when_training_fails(rank, monkeypatch):
    model, losses = tiny_pipeline(), []
    before, flags = state(model), [p.requires_grad for p in model.module.parameters()]
    loss = esd._loss

    def fails(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == 2:
            raise InterruptedError
        return losses[-1]

    monkeypatch.setattr(esd, "_loss", fails)
    with pytest.raises(InterruptedError):
        change(rank=rank).erase(model, COPPER)
    assert len(losses) == 2 and same(before, state(model))
    assert flags == [p.requires_grad for p in model.module.parameters()]


def test_only_the_trained_parameters_exist_twice(monkeypatch):
    """While the loss is computed: the teacher is the user's own tensors, and there is no other denoiser."""
    model, seen, loss = tiny_pipeline(), [], esd._loss
    kind = type(model.denoiser)
    mine = {name: p.data_ptr() for name, p in model.denoiser.named_parameters()}

    def denoisers():
        gc.collect()
        return sum(type(thing) is kind for thing in gc.get_objects())

    def looks(*arguments):
        moved = {name for name, p in model.denoiser.named_parameters() if p.data_ptr() != mine[name]}
        seen.append((moved, denoisers()))
        return loss(*arguments)

    count = denoisers()
    monkeypatch.setattr(esd, "_loss", looks)
    change(steps=1).erase(model, COPPER)
    assert seen == [(set(esd.chosen(model, "x")), count)]
    with steps_of(model, QUICK) as (_, student):
        with student.teacher():
            assert mine == {name: p.data_ptr() for name, p in model.denoiser.named_parameters()}
        assert mine != {name: p.data_ptr() for name, p in model.denoiser.named_parameters()}


@both_forms
@torch.no_grad()
def test_the_teacher_is_the_frozen_model_whatever_the_student_has_learnt(rank):
    model = tiny_pipeline()
    latents, prompts = model.noise([0, 1]), model.encode(["copper", "gold"])
    wanted = model.predict(latents, 401, prompts)
    with steps_of(model, change(rank=rank)) as (_, student):
        for parameter in student.module.parameters():
            parameter.add_(0.3 * parameter.requires_grad)
        assert not torch.allclose(model.predict(latents, 401, prompts), wanted, **ROUNDING)
        with student.teacher():
            assert torch.equal(model.predict(latents, 401, prompts), wanted)
        assert not torch.allclose(model.predict(latents, 401, prompts), wanted, **ROUNDING)
    assert torch.equal(model.predict(latents, 401, prompts), wanted)


@pytest.mark.parametrize("trajectory", ["edited", "frozen"])
@torch.no_grad()
def test_whose_samples_are_learnt_from(trajectory):
    model = tiny_pipeline()
    settings = change(trajectory=trajectory, batch_size=4)
    before, _ = start(model, settings)
    with steps_of(model, settings) as (steps, student):
        for parameter in student.module.parameters():
            parameter.add_(0.3 * parameter.requires_grad)
        (rows,) = steps.of(0)
    assert torch.equal(rows.timesteps, before.timesteps) and len(set(rows.timesteps.tolist())) > 1
    started = rows.timesteps == rows.timesteps.max()  # pure noise, before any step
    assert torch.equal(rows.latents[started], before.latents[started])
    moved = not torch.allclose(rows.latents[~started], before.latents[~started], **ROUNDING)
    assert moved == (trajectory == "edited")
    neutral, concept = noises(model, rows)
    torch.testing.assert_close(rows.target, 2 * neutral - concept, **ROUNDING)


def test_weights_in_half_precision_are_trained_in_float32():
    """With Adam's first step of 1e-5 no bfloat16 weight of size 0.1 would move."""
    model = tiny_pipeline()
    model.module.to(torch.bfloat16)
    before = state(model)
    edit = change(learning_rate=1e-5).erase(model, COPPER)
    assert same(before, state(model)) and model.dtype == torch.bfloat16
    sizes = [float(t.abs().max()) for t in tensors(edit).values()]
    assert all(t.dtype == torch.float32 for t in tensors(edit).values()) and 1e-6 < max(sizes) < 1e-4


# -- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,rank", [("sd1", None), ("sdxl", None), ("sd3", None), ("sd1", 4)])
@torch.no_grad()
def test_the_target_comes_closer_to_its_goal_and_no_prompt_moves_less(kind, rank):
    """On noise and seeds that the training has not seen.

    In SD 3, at random weights, the empty prompt moves as much as the concept does: only the first half holds there.
    """
    model, concept = tiny_pipeline(kind), Concept("copper")
    settings = change(steps=12, learning_rate=5e-3, rank=rank, trajectory="frozen")
    prompts, empty = model.encode(["copper"]), model.unconditional()
    x, t = model.rollout(prompts, steps=3, stop=[1, 2], seeds=[10**6, 10**6 + 1], guidance=3.0)
    neutral, before = model.predict(x, t, empty.repeat(2)), model.predict(x, t, prompts.repeat(2))
    goal = 2 * neutral - before
    with settings.erase(model, concept).applied(model):
        after, without = model.predict(x, t, prompts.repeat(2)), model.predict(x, t, empty.repeat(2))
    assert (after - goal).square().mean() < 0.8 * (before - goal).square().mean()
    if kind != "sd3":
        assert (without - neutral).square().mean() < (after - before).square().mean()


@both_forms
def test_a_run_that_stops_goes_on_to_the_same_edit(rank, tmp_path, monkeypatch):
    settings, losses, loss = change(rank=rank, steps=4), [], esd._loss
    bare = Plan.bare
    monkeypatch.setattr(
        Plan, "bare", lambda *rest, **more: dataclasses.replace(bare(*rest, **more), checkpoint_every=2)
    )
    model = tiny_pipeline()

    def stops(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == 4:
            raise InterruptedError
        return losses[-1]

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(esd, "_loss", stops)
        settings.erase(model, COPPER, checkpoint=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(esd, "_loss", lambda *rest: losses.append(loss(*rest)) or losses[-1])
        resumed = settings.erase(model, COPPER, checkpoint=tmp_path)
    assert len(losses) == 4 + 2  # from step 2
    assert same(tensors(resumed), tensors(settings.erase(model, COPPER)))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        settings.erase(model, COPPER, seed=1, checkpoint=tmp_path)


# -- settings and wrong input ----------------------------------------------------------------------------------------


def test_the_phrases_of_concepts():
    zinc = Concept("zinc", synonyms=("brass", "copper"), prompts=("a zinc roof", "a zinc pot"))
    assert ESD()._phrases([COPPER, zinc]) == ["copper", "brass", "a zinc roof", "a zinc pot"]
    assert ESD(phrases="names")._phrases([COPPER, zinc]) == ["copper", "brass", "zinc"]
    model = tiny_pipeline()
    with steps_of(model, change(batch_size=8, sampling_steps=1)) as (steps, _):
        asked = [steps.of(number)[0].prompts.texts for number in range(2)]
    assert asked[0] != asked[1] and set(asked[0] + asked[1]) == {"copper", "brass"}


def test_the_edit_says_how_it_was_made():
    edit = change(steps=1).erase(tiny_pipeline(), [COPPER, Concept("zinc")], seed=3)
    (record,) = edit.provenance
    assert (record["method"], record["concept"], record["seed"]) == ("ESD", "copper, zinc", 3)
    assert ESD.from_settings(json.loads(json.dumps(record["settings"]))) == change(steps=1)
    assert ESD.from_settings(json.loads(json.dumps(dataclasses.asdict(ESD())))) == ESD()


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"variant": "xattn"}, "variant must be one of x, u, full, x-strict, got 'xattn'"),
        ({"trajectory": "old"}, "trajectory must be one of edited, frozen"),
        ({"phrases": "texts"}, "phrases must be one of prompts, names"),
        ({"steps": 0, "rank": -1}, "rank, steps must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"negative_guidance": float("inf")}, "negative_guidance and guidance must be finite"),
        ({"erase_from": " "}, "erase_from must be a prompt or None"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ESD(**fields)


def test_wrong_input_is_refused_before_anything_is_done(monkeypatch):
    model = tiny_pipeline()
    before = state(model)
    with pytest.raises(ValueError, match="No concept was given"):
        QUICK.erase(model, [])
    with pytest.raises(ValueError, match="tokens"):
        QUICK.erase(model, Concept("copper " * 40))
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="edit is in force"):
        QUICK.erase(model, COPPER)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="one process, there are 2"):
        patch.setattr("accelerate.Accelerator.num_processes", 2)
        QUICK.erase(model, COPPER)
    nothing = dataclasses.replace(esd.UNET, cross=r"\.attn3\.")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="'x' selects no parameter of this UNet2D"):
        patch.setitem(esd.NAMES, "UNet2DConditionModel", nothing)
        QUICK.erase(model, COPPER)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="names of UNet2DConditionModel; known: SD3Tr"):
        patch.delitem(esd.NAMES, "UNet2DConditionModel")
        QUICK.erase(model, COPPER)
    norms = dataclasses.replace(esd.UNET, cross=r"norm1\.")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no linear layer that could take an adapter"):
        patch.setitem(esd.NAMES, "UNet2DConditionModel", norms)
        change(rank=2).erase(model, COPPER)
    assert same(before, state(model)) and not model.applied


def test_a_name_is_not_a_concept():
    for given in ("dog", ["dog"]):
        with pytest.raises(ValueError, match=r"erase takes a Concept, got 'dog'; write Concept\('dog'\)"):
            ESD().erase(tiny_pipeline("sd1"), given)
