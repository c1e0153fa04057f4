"""TRCE: stage 1 is the spec's loop of every layer; the contrast by hand; what stage 2 trains, stores and resumes."""

import dataclasses
import json
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from hosts import CLIP_TOKENS, GARDEN, METALS, same, state, tiny_pipeline

from conceptx import Concept, Edit, load
from conceptx.methods import TRCE, trce
from conceptx.places import tasks_folder
from conceptx.testbeds import emoji
from conceptx.train.loop import Plan

METAL = Concept(
    "copper",
    synonyms=("brass", "grandmothers"),  # a word of several tokens
    prompts=("Copper and tin make bronze", "the smith hammers"),
    anchor="bread",
    retain=("cat", "the little bird"),
    retain_texts=tuple(GARDEN),
)
UNETS = pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
FIRST = TRCE(steps=0)
QUICK = TRCE(steps=3, batch_size=2, keep_batch=2, sampling_steps=4, trajectories=2, unconditional=3, learning_rate=1e-3)
# float32 predictions of size 1 in batches of another size, a few layers
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def change(settings=QUICK, **fields):
    return dataclasses.replace(settings, **fields)


def tensors(edit):
    (shared,) = edit.maps["text"]
    found = {f"{name}:{part}": t for name, delta in edit.deltas.items() for part, t in delta.tensors().items()}
    return found | {"write": shared.write, "read": shared.read}


@cache
def sd1():
    """In float64, so that a prompt's rows do not depend on which others are encoded with it."""
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)
    return model


def ends(model, text):
    """The place of the end-of-text token, counted by the tokenizer alone."""
    return len(model.pipeline.tokenizer(text).input_ids) - 1


def row(model, text):
    return model.encode([text]).states[0, ends(model, text)].double()


# -- stage 1: theorems -------------------------------------------------------------------------------------------------


def loop(weight, pairs, kept, eta, ridge):
    """The spec's formula for one matrix, prompt by prompt; `kept`: the rows of each text."""
    right = ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    left = ridge * weight
    for unsafe, safe in pairs:
        left = left + weight @ torch.outer(safe, unsafe) / len(pairs)
        right = right + torch.outer(unsafe, unsafe) / len(pairs)
    for text in kept:
        moments = text.T @ text
        left, right = left + eta / len(kept) * weight @ moments, right + eta / len(kept) * moments
    return left @ torch.linalg.inv(right)


def test_stage_1_is_the_published_loop_of_every_layer():
    model, eraser = sd1(), change(FIRST, retain_weight=0.3, ridge=1e-2, templates=("{}", "the {} sings"))
    edit = eraser.erase(model, METAL)
    texts = [
        *((form.format(name), form.format("bread")) for name in ("copper", "brass", "grandmothers") for form in
          ("{}", "the {} sings")),
        ("Copper and tin make bronze", "bread and tin make bronze"),
        ("the smith hammers", "bread"),  # which holds no name
    ]  # fmt: skip
    assert edit.provenance[0]["prompts"] == len(texts) == 8
    pairs = [(row(model, unsafe), row(model, safe)) for unsafe, safe in texts]
    kept = [model.encode([text]).states[0].double() for text in ("", *METAL.retain, *GARDEN)]
    folded = edit.fold(model)
    assert {name.removesuffix(".weight") for name in folded.deltas} == {*model.projections} and not folded.maps
    for name, delta in folded.deltas.items():
        weight = model.parameter(name).double()
        wanted = loop(weight, pairs, kept, 0.3, 1e-2)
        # float64 sums of size 1e3 divided by a ridge of 1e-2: 1e-16 becomes 1e-11; two digits of room
        torch.testing.assert_close(delta.added_to(weight), wanted, rtol=0, atol=1e-9)
        assert (wanted - weight).abs().max() > 1e-2


def test_the_row_is_where_the_tokenizer_ends_the_prompt_not_where_the_words_do():
    """A word of several tokens: an index by words would hit a content token, whose row is another one."""
    model, name = sd1(), "grandmothers"
    count = ends(model, name)
    assert count > 2
    rows, encoded = trce.TokenRows.of(model, [(name, "")], trimmed=True), model.encode([name]).states[0].double()
    torch.testing.assert_close(rows.last_rows([(name, "")])[0], encoded[count], rtol=0, atol=1e-12)
    ends_early = encoded[2]  # where a prompt of one word of one token ends
    (shared,) = (
        change(FIRST, templates=("{}",), ridge=1e-9, retain_weight=1e-9)
        .erase(model, Concept(name, anchor="bread"))
        .maps["text"]
    )
    goal = row(model, "bread")
    torch.testing.assert_close(shared(encoded[count]), goal, rtol=0, atol=1e-4)
    assert (shared(ends_early) - goal).norm() > 0.5 * (ends_early - goal).norm()


def test_end_of_text_rows_go_to_the_safe_ones_and_the_words_and_the_retained_move_less():
    model = sd1()
    (shared,) = change(FIRST, retain_weight=1e-2).erase(model, METAL).maps["text"]
    concept, kept = (model.encode([text]).states[0].double() for text in ("copper", "the little bird"))
    moved, end = (shared(concept) - concept).norm(dim=1), ends(model, "copper")
    drift = (shared(kept) - kept).norm(dim=1)
    assert moved[end] > 1.2 * moved[:end].max() and moved[end] > 1.2 * drift.max() and moved[end] > 2 * drift.mean()
    assert (shared(concept[end]) - row(model, "bread")).norm() < 0.2 * (concept[end] - row(model, "bread")).norm()


def test_without_an_anchor_a_concept_becomes_the_empty_prompt():
    model = sd1()
    (shared,) = change(FIRST, ridge=1e-9, retain_weight=1e-9).erase(model, Concept("copper")).maps["text"]
    torch.testing.assert_close(shared(row(model, "copper")), row(model, ""), rtol=0, atol=1e-4)


def test_more_weight_on_the_retained_moves_them_less_and_the_concept_too():
    model = sd1()
    kept = model.encode(list(METAL.retain)).states.double().flatten(0, 1)
    drift, gap = [], []
    for weight in (1e-4, 1e-2, 1.0, 100.0):
        (shared,) = change(FIRST, retain_weight=weight).erase(model, METAL).maps["text"]
        drift.append(float((shared(kept) - kept).norm()))
        gap.append(float((shared(row(model, "copper")) - row(model, "bread")).norm()))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 0.3 * drift[0]
    assert gap == sorted(gap)


def test_stage_1_fits_every_pipeline_with_these_text_encoders_and_sd3_too():
    model = tiny_pipeline("sd1")
    edit = FIRST.erase(model, METAL)
    assert not edit.deltas and {*edit.host.parts} == {"text_encoder"}
    other = tiny_pipeline("sd1")
    for parameter in other.denoiser.parameters():
        parameter.data *= 0.9
    with edit.applied(other):
        pass
    third = tiny_pipeline("sd3")
    assert {*FIRST.erase(third, METAL).host.parts} == {"text_encoder", "text_encoder_2", "text_encoder_3"}


# -- stage 2: the loss -------------------------------------------------------------------------------------------------


def noises(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()


def test_the_contrast_by_hand_and_zero_where_the_margin_holds():
    noise, safe, unsafe = noises(2, 3, 4, 4)
    found = trce.contrast(noise, safe, unsafe, 0.01)
    for n in range(2):
        near, far = ((noise[n] - goal[n]).square().sum() / 48 for goal in (safe, unsafe))
        assert float(found[n]) == pytest.approx(max(0.0, float(near - far) + 0.01))
    assert not trce.contrast(safe, safe, unsafe, 0.01).any()  # |safe - unsafe|^2 is about 2
    torch.testing.assert_close(trce.contrast(safe, safe, safe, 0.01), torch.full((2,), 0.01).double())


def test_the_gradient_goes_from_unsafe_to_safe_and_is_zero_where_the_margin_holds():
    _, safe, unsafe = noises(1, 3, 4, 4)
    noise = unsafe.clone().requires_grad_()
    trce.contrast(noise, safe, unsafe, 0.01).sum().backward()
    torch.testing.assert_close(noise.grad, 2 * (unsafe - safe) / 48)  # (n - s)^2 - (n - u)^2 is linear in n
    noise = safe.clone().requires_grad_()
    trce.contrast(noise, safe, unsafe, 0.01).sum().backward()
    assert not noise.grad.any()


@contextmanager
def steps_of(model, settings=QUICK, concept=METAL, seed=0):
    """The steps of a run, its student and the map of its first stage, before the first step."""
    pairs = list(settings._pairs(concept))
    shared = settings._shared(model, pairs, ["cat"])
    asked = trce._Asked.of(model, pairs, shared)
    draws = trce._Draws(settings, len(pairs), seed)
    latents = trce.stored(model, asked.plain, draws)
    names = trce.chosen(model)
    with trce.weights_in_place(model.denoiser, names, f"{model.denoiser_name}.") as student:
        yield trce._Steps(settings, model, student, asked, draws, latents), pairs, shared


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_targets_come_from_the_original_model_and_the_student_reads_the_mapped_prompts(kind):
    """By hand, one latent at a time; the student's weights are spoilt, which no target may notice."""
    model, plain = tiny_pipeline(kind), tiny_pipeline(kind)
    with steps_of(model) as (steps, pairs, shared):
        for name in trce.chosen(model):
            model.denoiser.get_parameter(name).add_(0.1)
        erase, keep = steps.of(0)
        (concept, _), n = steps.draws.of(0), len(pairs)
        student = [model.predict(part.latents, part.timesteps, part.prompts) for part in (erase, keep)]
        losses = [trce._loss(model, model.denoiser, part) for part in (erase, keep)]
    stage1 = Edit(plain.text_fingerprint, maps={"text": (shared,)})
    empty = plain.unconditional()
    total = 0.0
    for k, (prompt, *_) in enumerate(concept):
        x, t = erase.latents[k : k + 1], erase.timesteps[k]
        assert torch.equal(x[0], erase.latents[k + len(concept)]) and t == erase.timesteps[k + len(concept)]
        e0, em, es = (plain.predict(x, t, p) for p in (empty, *(plain.encode([text]) for text in pairs[prompt])))
        safe, unsafe = es + 15 * (es - e0), em + 15 * (em - e0)
        torch.testing.assert_close(erase.safe[k : k + 1], safe, rtol=1e-3, atol=1e-4)  # 16 times the rounding
        torch.testing.assert_close(erase.unsafe[k : k + 1], unsafe, rtol=1e-3, atol=1e-4)
        for noise in (student[0][k], student[0][k + len(concept)]):  # asked for the concept, asked for nothing
            gap = (noise - safe[0]).square().mean() - (noise - unsafe[0]).square().mean() + 0.01
            total += max(0.0, float(gap)) / (2 * len(concept))
    assert erase.prompts.texts == (*(pairs[prompt][0] for prompt, *_ in concept), *[""] * len(concept)) and n == 20
    assert float(losses[0]) == pytest.approx(total, rel=1e-3, abs=1e-4)
    with stage1.applied(plain):
        wanted = plain.predict(keep.latents, keep.timesteps, empty)
        asked = plain.predict(erase.latents[:1], erase.timesteps[:1], plain.encode([erase.prompts.texts[0]]))
    torch.testing.assert_close(keep.target, wanted, **ROUNDING)
    assert float(losses[1]) == pytest.approx(100 * float((student[1] - wanted).square().mean()), rel=1e-2)
    mapped = plain.predict(erase.latents[:1], erase.timesteps[:1], erase.prompts.select([0]))
    torch.testing.assert_close(mapped, asked, **ROUNDING)  # the map in force, without a hook


@torch.no_grad()
def test_a_walk_is_the_rollout_at_every_stop_each_latent_with_its_own_timestep():
    model = tiny_pipeline("sd1")
    prompts, options = model.encode(["copper", "cat"]), {"steps": 4, "seeds": [3, 4]}
    for guidance in (3.0, 1.0):
        for stop, (latents, timestep) in enumerate(model.walk(prompts, guidance=guidance, **options)):
            wanted, times = model.rollout(prompts, stop=stop, guidance=guidance, **options)
            torch.testing.assert_close(latents, wanted, **ROUNDING)
            assert times.tolist() == [int(timestep)] * 2
        assert stop == 3


@torch.no_grad()
def test_only_early_latents_of_the_concept_and_whole_ways_without_a_prompt_are_stored():
    settings = change(steps=40, sampling_steps=4, early=0.5, trajectories=2, unconditional=3)
    model = tiny_pipeline("sd1")
    with steps_of(model, settings) as (steps, pairs, _):
        stored, empty = steps.latents, 2 * len(pairs)
        assert {stop for prompt, _, stop in stored if prompt != empty} == {0, 1, 2}  # of 50: 0..25
        assert {(number, stop) for prompt, number, stop in stored if prompt == empty} == {
            (number, stop) for number in range(3) for stop in range(4)
        }
        assert {number for prompt, number, _ in stored if prompt != empty} == {0, 1}
        assert stored.keys() == {draw for step in range(40) for part in steps.draws.of(step) for draw in part}
        prompt, number, stop = next(draw for draw in stored if draw[0] != empty and draw[2] == 2)
        wanted, time = model.rollout(
            model.encode([pairs[prompt][0]]), steps=4, stop=stop, seeds=[steps.draws.noise_seed(prompt, number)],
            guidance=3.0,
        )  # fmt: skip
        torch.testing.assert_close(stored[prompt, number, stop][0][None], wanted, **ROUNDING)
        assert float(stored[prompt, number, stop][1]) == float(time)


# -- stage 2: the run --------------------------------------------------------------------------------------------------


@UNETS
def test_stage_2_trains_self_attention_and_queries_and_leaves_everything_as_it_was(kind):
    model = tiny_pipeline(kind)
    model.denoiser.train()
    first = next(model.denoiser.parameters())
    first.requires_grad_(False)
    before, random_state, modes = state(model), torch.get_rng_state(), [m.training for m in model.module.modules()]
    places = {name: p.data_ptr() for name, p in model.module.named_parameters()}
    edit = change(steps=2).erase(model, METAL)
    assert same(before, state(model)) and places == {n: p.data_ptr() for n, p in model.module.named_parameters()}
    assert torch.equal(random_state, torch.get_rng_state()) and not model.applied
    assert not first.requires_grad and modes == [m.training for m in model.module.modules()]
    assert all(p.grad is None for p in model.module.parameters())
    names = [n for n in before if ".attn1." in n or ".attn2.to_q." in n]
    assert sorted(edit.deltas) == sorted(names) and any("to_out.0.bias" in name for name in names)
    assert all(delta.kind == "dense" for delta in edit.deltas.values())
    assert sum(bool(delta.change.any()) for delta in edit.deltas.values()) > 0.8 * len(names)
    with edit.applied(model):
        changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
        assert changed and changed <= set(names)
    assert same(before, state(model))


def test_gradients_of_a_step_are_its_own(monkeypatch):
    """With a learning rate of nearly nothing every step of the same rows has the same gradient, none adds up."""
    model, norms, draws = tiny_pipeline("sd1"), [], trce._Draws.of
    monkeypatch.setattr(trce._Draws, "of", lambda self, step: draws(self, 0))
    loss = trce._loss

    def looks(model, module, part):
        norms.append([float(p.grad.norm()) for p in module.parameters() if p.grad is not None])
        return loss(model, module, part)

    monkeypatch.setattr(trce, "_loss", looks)
    change(learning_rate=1e-12).erase(model, METAL)
    assert [bool(found) for found in norms] == [False, True] * 3  # nothing is left when a step begins
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[5]), rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_contrast_falls_on_latents_that_were_not_learnt_from_and_no_prompt_keeps_its_noise():
    """With a push of 15 stage 1 alone keeps the margin on this random model."""
    model = tiny_pipeline("sd1")
    settings = change(steps=8, learning_rate=2e-3, push=3.0, keep_weight=10.0, batch_size=4)
    edit = settings.erase(model, METAL)
    stage1 = dataclasses.replace(edit, deltas={})
    seeds = list(range(10**6, 10**6 + 8))
    asked, safe, empty = (model.encode([t]) for t in ("copper", "bread", ""))
    x, t = model.rollout(asked, steps=4, stop=[1, 2] * 4, seeds=seeds, guidance=3.0)
    e0, em, es = (model.predict(x, t, prompts) for prompts in (empty, asked, safe))
    found = {}
    for name, tried in (("before", stage1), ("after", edit)):
        with tried.applied(model):
            noise, idle = model.predict(x, t, asked), model.predict(x, t, empty)
        found[name] = float(trce.contrast(noise, 4 * es - 3 * e0, 4 * em - 3 * e0, 0.01).mean()), idle
    assert found["after"][0] < 0.8 * found["before"][0]
    assert (found["after"][1] - found["before"][1]).square().mean() < 0.1 * (em - e0).square().mean()


def test_the_seed_decides():
    model = tiny_pipeline("sd1")
    one, again, other = (QUICK.erase(model, METAL, seed=seed) for seed in (0, 0, 1))
    assert same(tensors(one), tensors(again)) and not same(tensors(one), tensors(other))


def test_weights_in_half_precision_are_trained_in_float32():
    model = tiny_pipeline("sd1")
    model.module.to(torch.bfloat16)
    before = state(model)
    edit = change(steps=2, learning_rate=1e-6).erase(model, METAL)
    assert same(before, state(model)) and model.dtype == torch.bfloat16
    sizes = [float(delta.change.abs().max()) for delta in edit.deltas.values()]
    assert 1e-7 < max(sizes) < 1e-5  # below what a bfloat16 weight of size 0.1 could hold


def test_a_run_that_stops_goes_on_to_the_same_edit(tmp_path, monkeypatch):
    settings, count, loss = change(steps=4), [], trce._loss
    monkeypatch.setattr(trce, "Plan", partial(Plan, checkpoint_every=2))
    model = tiny_pipeline("sd1")
    before = state(model)

    def stops(*arguments):
        count.append(1)
        if len(count) == 6:  # in the third step: two parts each
            raise InterruptedError
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(trce, "_loss", stops)
        settings.erase(model, METAL, checkpoint=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"} and same(before, state(model))
    with monkeypatch.context() as patch:
        patch.setattr(trce, "_loss", lambda *rest: count.append(1) or loss(*rest))
        resumed = settings.erase(model, METAL, checkpoint=tmp_path)
    assert len(count) == 6 + 2 * 2  # from step 2
    assert same(tensors(resumed), tensors(settings.erase(model, METAL)))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        settings.erase(model, METAL, seed=1, checkpoint=tmp_path)


# -- settings and wrong input ------------------------------------------------------------------------------------------


def test_the_safe_prompt_has_the_anchor_in_the_names_place():
    prompts = ("a grandmothers' Brass", "coppery", "copper or brass")
    concept = METAL.model_copy(update={"prompts": prompts})
    pairs = list(change(templates=("a {}",))._pairs(concept))
    assert pairs[:3] == [("a copper", "a bread"), ("a brass", "a bread"), ("a grandmothers", "a bread")]
    assert [safe for _, safe in pairs[3:]] == ["a bread' bread", "bread", "bread or bread"]
    assert {safe for _, safe in QUICK._pairs(concept.model_copy(update={"anchor": None}))} == {""}


def test_the_edit_says_how_it_was_made():
    (record,) = FIRST.erase(tiny_pipeline("sd1"), [METAL, Concept("zinc")], seed=3).provenance
    assert (record["method"], record["concept"], record["seed"]) == ("TRCE", "copper, zinc", 3)
    assert TRCE.from_settings(json.loads(json.dumps(record["settings"]))) == FIRST


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"sampling_steps": 0, "ridge": float("nan")}, "sampling_steps, ridge must be positive"),
        ({"steps": -1, "margin": float("inf")}, "steps, margin must be finite and not negative"),
        ({"push": float("inf")}, "push and guidance must be finite"),
        ({"early": 1.5}, r"early is a share of the sampling steps, in 0\.\.1, got 1\.5"),
        ({"templates": ("photo",)}, "must contain {} once"),
        ({"templates": ()}, "must contain {} once"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TRCE(**fields)


@pytest.mark.parametrize(
    "concepts,message",
    [
        ([], "No concept was given"),
        (["copper"], r"write Concept\('copper'\)"),
        ([Concept("cat"), Concept("Cat")], "more than once: cat"),
        ([Concept("cat", anchor="CAT")], "an anchor as well: CAT"),
        ([Concept("cat", anchor="dog"), Concept("dog")], "an anchor as well: dog"),
        ([Concept("copper " * CLIP_TOKENS)], "tokens"),
        ([Concept("copper", retain_texts=(" ".join(METALS),))], "tokens"),
    ],
)
def test_a_wrong_task_is_one_clear_error_before_anything_changes(concepts, message):
    model = sd1()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        QUICK.erase(model, concepts)
    assert same(before, state(model)) and not model.applied


def test_what_it_has_no_meaning_for_is_refused():
    model = tiny_pipeline("sd3")
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel has none; steps=0 leaves that out\."):
        QUICK.erase(model, METAL)
    for settings in (QUICK, FIRST):
        with pytest.raises(ValueError, match="end-of-text row of CLIP, this denoiser reads the rows of a T5Encoder"):
            settings.erase(tiny_pipeline("flux"), METAL)
    model = tiny_pipeline("sd1")
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="edit is in force"):
        FIRST.erase(model, METAL)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match="TRCE trains in one process, there are 2"):
        QUICK.erase(tiny_pipeline("sd1"), METAL)


# -- behaviour ---------------------------------------------------------------------------------------------------------


@cache
def emoji_model():
    return load(emoji.NAME)


def shown(edit, names):
    """How often each name, asked for in two templates and two styles, is what the picture shows."""
    model, judges = emoji_model(), emoji.judges()
    forms = ("a noto {}", "ink {}", "a twemoji emoji of a {}", "{} in fluent style")
    with edit.applied(model):
        drawn = model.generate([form.format(n) for n in names for form in forms], seeds=range(4 * len(names)), steps=10)
    found = judges.objects(drawn).argmax(1).reshape(len(names), 4)
    wanted = torch.tensor([judges.object_names.index(name) for name in names])
    return (found == wanted[:, None]).float().mean(1)


def test_the_map_alone_takes_the_dog_and_leaves_the_others():
    model, dog = emoji_model(), Concept.load(tasks_folder() / "concepts" / "dog.toml")
    others = ("cat", "owl", "horse", "castle", "guitar")  # two of them are not retained
    before = shown(Edit(model.fingerprint), ("dog", *others))
    after = shown(FIRST.erase(model, dog), ("dog", *others))
    assert before[0] >= 0.75 and before[1:].mean() >= 0.75
    assert after[0] == 0 and after[1:].mean() >= before[1:].mean() - 0.1


@pytest.mark.slow
@torch.no_grad()
def test_stage_2_turns_the_early_steps_away_from_the_dog_and_leaves_the_others():
    model, dog = emoji_model(), Concept.load(tasks_folder() / "concepts" / "dog.toml")
    edit = TRCE(steps=60, batch_size=4, sampling_steps=20, unconditional=64, learning_rate=1e-4).erase(model, dog)
    asked, safe, empty = (model.encode([t]) for t in ("a twemoji dog", "a twemoji cat", ""))
    x, t = model.rollout(asked, steps=20, stop=[2, 5, 8] * 8, seeds=range(10**6, 10**6 + 24), guidance=3.0)
    e0, em, es = (model.predict(x, t, prompts) for prompts in (empty, asked, safe))

    def contrast(tried):
        with tried.applied(model):
            noise = model.predict(x, t, asked)
        return float(trce.contrast(noise, 16 * es - 15 * e0, 16 * em - 15 * e0, 0.01).mean())

    first, both = contrast(dataclasses.replace(edit, deltas={})), contrast(edit)
    assert both < first
    others = ("cat", "owl", "horse", "castle", "guitar")
    after = shown(edit, ("dog", *others))
    assert after[0] == 0 and after[1:].mean() >= shown(Edit(model.fingerprint), others).mean() - 0.1
