"""RealEra, a reconstruction: where drawn rows lie, the closed form as a plain loop, the LoRA, runs, behaviour."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from hosts import CLIP_TOKENS, GARDEN, PIPELINES, same, state, tiny_pipeline

from conceptx import Concept, load
from conceptx.demo.images import short_benchmark
from conceptx.evaluation.images import evaluate_images
from conceptx.geometry import ConceptMap
from conceptx.methods import RealEra, realera
from conceptx.methods.realera import nearest, placed
from conceptx.models.token_rows import TokenRows
from conceptx.places import tasks_folder
from conceptx.testbeds import emoji

CAT = Concept("cat", anchor="apple tree", retain=("bird", "iron"), retain_texts=GARDEN[1:4])
QUICK = RealEra(near=3, far=4, steps=2, sampling_steps=3, learning_rate=1e-2)
MAP = dataclasses.replace(QUICK, steps=0)


def change(**fields):
    return dataclasses.replace(QUICK, **fields)


@cache
def sd1():
    """In float64, so that a prompt's rows do not depend on which others are encoded with it."""
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)
    return model


def tensors(edit):
    deltas = {f"{name}:{part}": t for name, delta in edit.deltas.items() for part, t in delta.tensors().items()}
    return deltas | {f"map:{part}": t for part, t in edit.maps["text"][0].tensors().items()}


def rows(seed=0, count=5, width=700):
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


# -- where drawn rows lie --------------------------------------------------------------------------------------------


def test_a_drawn_row_has_its_length_and_its_cosine_by_construction():
    given, low = rows(), torch.tensor([0.5, 0.6, 0.7, 0.8, 1.0]).double()
    found = placed(given, 2000, low, 1.0, torch.Generator().manual_seed(1))
    assert found.shape == (2000, 5, 700)
    torch.testing.assert_close(found.norm(dim=2), given.norm(dim=1).expand(2000, 5))
    cosines = (found * given).sum(-1) / given.square().sum(1)
    assert bool((cosines > low - 1e-12).all()) and float(cosines.max()) < 1 + 1e-12
    # the mean of 2,000 uniform numbers from a range of at most 0.5: its error is 0.0032; four of them
    torch.testing.assert_close(cosines.mean(0), (low + 1) / 2, rtol=0, atol=0.013)
    off = found - cosines[..., None] * given
    directions = off[:, 0] / off[:, 0].norm(dim=1, keepdim=True)
    # random directions in 699 dimensions: their cosines have a spread of 0.038
    assert (directions[:1000] * directions[1000:]).sum(1).abs().mean() < 0.05


def test_plain_noise_would_lie_on_a_thin_shell():
    """Why rows are placed: noise that reaches a cosine of 0.9 has nearly one distance and nearly no part along e."""
    given = rows(count=1)
    noise = torch.randn(1000, 700, generator=torch.Generator().manual_seed(2)).double()
    noise *= given.norm() / 2 / 700**0.5
    cosines = torch.cosine_similarity(given + noise, given)
    assert float(cosines.std()) < 0.02 and float((noise.norm(dim=1) / noise.norm(dim=1).mean()).std()) < 0.03
    found = placed(given, 1000, torch.tensor([0.8]).double(), 1.0, torch.Generator().manual_seed(2))[:, 0]
    assert float(torch.cosine_similarity(found, given).std()) > 0.05  # 0.2 / sqrt(12)


def test_distance_and_cosine_are_tied():
    given = rows()
    assert torch.equal(nearest(given, (0.7, 0.9), None), torch.full((5,), 0.7, dtype=torch.float64))
    for distance in (20.0, 45.0, 1e6):
        low = nearest(given, (0.7, 1.0), distance)
        found = placed(given, 500, low, 1.0, torch.Generator().manual_seed(3))
        gaps = (found - given).norm(dim=2)
        tied = given.norm(dim=1) * (2 - 2 * 0.7) ** 0.5  # D_1 of the cosines alone
        bound = torch.minimum(torch.tensor(distance).double(), tied)
        assert bool((gaps <= bound + 1e-9).all()) and bool((gaps.max(0).values > 0.95 * bound).all())
    with pytest.raises(
        ValueError, match=r"near_distance 1.0 has a cosine of at least 0.99\d+; near_cosines ends at 0.9"
    ):
        nearest(given, (0.7, 0.9), 1.0)


# -- the closed form -------------------------------------------------------------------------------------------------


def block(text):
    return sd1().encode([text]).states[0]


def last(text):
    return max(len(sd1().pipeline.tokenizer(text).input_ids) - 2, 1)


@pytest.mark.parametrize("tokens", ["last", "last+rest"])
@pytest.mark.parametrize("captions", [0.0, 0.7])
def test_the_map_is_the_plain_loop_of_every_layer(tokens, captions):
    """Spec, section 3, row by row in float64, on the rows that the method draws."""
    settings = dataclasses.replace(MAP, tokens=tokens, far_weight=0.6, ridge=0.3, captions_weight=captions)
    gold = Concept("gold", retain=("bread",))
    edit = settings.erase(sd1(), [CAT, gold], seed=4)
    assert not edit.deltas and set(edit.host.parts) == {"text_encoder"}
    names = TokenRows.of(sd1(), [("cat", "cat"), ("apple tree", "apple tree"), ("gold", "gold"), ("", "")])
    near, far, goals = [], [], []
    for name, anchor in (("cat", "apple tree"), ("gold", "")):
        around = settings._surroundings(names, ((name, name), (anchor, anchor)), 4)
        count = 1 if tokens == "last" else CLIP_TOKENS - max(last(name), last(anchor))
        torch.testing.assert_close(around.near[0], block(name)[last(name) :][:count])
        assert around.near.shape == (4, count, 32) and around.far.shape == (4, count, 32)
        near += [*around.near.flatten(0, 1)]
        goals += [*block(anchor)[last(anchor) :][:count]] * 4
        far += [*around.far.flatten(0, 1)]
    far += [row for text in ("", "bird", "iron", "bread") for row in block(text)]
    kept = [row for text in CAT.retain_texts for row in block(text)]
    for projection in sd1().projections:
        weight = sd1().parameter(f"{projection}.weight")
        first, second = 0.3 * weight, 0.3 * torch.eye(32).double()
        for x, goal in zip(near, goals, strict=True):
            first = first + torch.outer(weight @ goal, x)
            second = second + torch.outer(x, x)
        for scale, others in ((0.6, far), (captions / len(CAT.retain_texts), kept)):
            for y in others:
                first = first + scale * torch.outer(weight @ y, y)
                second = second + scale * torch.outer(y, y)
        wanted = first @ torch.inverse(second)
        # some hundred float64 products of size 10 over a ridge of 0.3
        torch.testing.assert_close(edit.maps["text"][0].fold(weight)[0], wanted, rtol=0, atol=1e-9)
        assert (wanted - weight).abs().max() > 1e-2


def test_neighbours_pull_every_direction_unless_far_rows_hold_it():
    """The trap of the spec: what is left of directions that nobody asked about."""
    concept, draw = Concept("cat", anchor="apple tree"), torch.Generator().manual_seed(0)
    probe = torch.randn(200, 32, generator=draw).double()
    row = block("cat")[1]
    probe -= torch.outer(probe @ row, row) / row.square().sum()
    left = {}
    for near, far in ((0, 0), (30, 0), (30, 300)):
        edit = dataclasses.replace(MAP, near=near, far=far, tokens="last").erase(sd1(), concept)
        left[near, far] = float((edit.maps["text"][0](probe) - probe).norm() / probe.norm())
    assert left[30, 0] > 2 * left[0, 0] and left[30, 300] < 0.1 * left[30, 0]


def test_more_neighbours_take_more_of_what_lies_near():
    near = placed(block("cat")[1:2], 50, torch.tensor([0.8]).double(), 0.8, torch.Generator().manual_seed(9))[:, 0]
    goal, gaps = block("apple tree")[last("apple tree")], []
    for count in (0, 30):
        settings = dataclasses.replace(MAP, near=count, far=0, near_cosines=(0.7, 1.0), tokens="last")
        gaps.append(
            float((settings.erase(sd1(), Concept("cat", anchor="apple tree")).maps["text"][0](near) - goal).norm())
        )
    assert gaps[1] < 0.8 * gaps[0]


# -- the LoRA --------------------------------------------------------------------------------------------------------


def steps_of(model, settings, student):
    names = TokenRows.of(model, [("cat", "cat"), ("apple tree", "apple tree"), ("bird", "bird"), ("", "")])
    around = [settings._surroundings(names, (("cat", "cat"), ("apple tree", "apple tree")), 0)]
    shared = ConceptMap(torch.eye(32)[:, :1], 0.5 * torch.eye(32)[:1], torch.zeros(32))
    asked = realera._Asked(shared, around, names.prompts.select([2, 3]))
    return realera._Steps(settings, model, student, asked, 0), asked


class Untrained:
    """A student whose adapter does nothing."""

    def disable_adapter(self):
        return torch.no_grad()


@torch.no_grad()
def test_a_step_asks_for_a_neighbour_and_expects_the_anchor():
    model = tiny_pipeline()
    steps, asked = steps_of(model, change(batch_size=3, keep_weight=0.5, far=2, tokens="last"), Untrained())
    (cat,), drawn = asked.around, set()
    for step in range(8):
        (given,) = steps.of(step)
        assert torch.equal(given.latents, steps.of(step)[0].latents)
        assert given.weights.tolist() == pytest.approx([1 / 3] * 3 + [0.5 / 3] * 3)
        plain = given.prompts.states.clone()
        plain[..., 0] /= 1.5  # before the map
        for row in range(3):
            x = plain[row, cat.start].double()
            match = [n for n, near in enumerate(cat.near) if torch.allclose(near[0], x, atol=1e-5)]
            drawn.update(match)
            assert len(match) == 1 and given.prompts.texts[row] == "cat"
            goal = model.predict(given.latents[[row]], given.timesteps[[row]], model.encode(["apple tree"]))
            torch.testing.assert_close(given.target[[row]], goal, rtol=1e-4, atol=1e-5)  # float32, other batches
        for row in range(3, 6):
            prompt = dataclasses.replace(given.prompts.select([row]), states=plain[[row]])
            same_again = model.predict(given.latents[[row]], given.timesteps[[row]], prompt)
            torch.testing.assert_close(given.target[[row]], same_again, rtol=1e-4, atol=1e-5)
            drawn.add(given.prompts.texts[row])
    assert drawn == {0, 1, 2, 3, "cat", "bird", ""}  # e and all of N; of F what was drawn, and the names


@torch.no_grad()
def test_the_target_comes_closer_to_the_anchor_than_by_the_map_alone():
    model = tiny_pipeline()
    prompts, goal = model.encode(["cat"]), model.encode(["apple tree"])
    x, t = model.rollout(prompts, steps=3, stop=[1, 2], seeds=[10**6, 10**6 + 1], guidance=3.0)
    wanted, gaps = model.predict(x, t, goal), []
    for steps in (0, 30):
        settings = change(
            steps=steps, far_weight=20.0, near=2, learning_rate=1e-2
        )  # held so much that the map does little
        with settings.erase(model, CAT).applied(model):
            gaps.append(float((model.predict(x, t, prompts) - wanted).norm()))
    assert gaps[1] < 0.9 * gaps[0]


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_host_stays_and_the_seed_decides_on_every_architecture(kind):
    model = tiny_pipeline(kind)
    before, random_state = state(model), torch.get_rng_state()
    one, again, other = (QUICK.erase(model, CAT, seed=seed) for seed in (0, 0, 1))
    assert same(before, state(model)) and torch.equal(random_state, torch.get_rng_state()) and not model.applied
    assert same(tensors(one), tensors(again)) and not same(tensors(one), tensors(other))
    assert set(one.deltas) == {f"{path}.weight" for path in model.projections}
    assert any(bool(delta.up.any()) for delta in one.deltas.values())
    assert all(len(delta.down) == QUICK.rank for delta in one.deltas.values())


def test_a_run_that_stops_goes_on_to_the_same_edit(tmp_path, monkeypatch):
    model, losses, loss = tiny_pipeline(), [], realera._loss
    settings, plan = change(steps=4), realera.Plan
    monkeypatch.setattr(realera, "Plan", lambda *rest, **more: plan(*rest, **more, checkpoint_every=2))

    def stops(*arguments):
        losses.append(loss(*arguments))
        if len(losses) == 4:
            raise InterruptedError
        return losses[-1]

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(realera, "_loss", stops)
        settings.erase(model, CAT, checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(realera, "_loss", lambda *rest: losses.append(loss(*rest)) or losses[-1])
        resumed = settings.erase(model, CAT, checkpoint=tmp_path)
    assert len(losses) == 4 + 2
    assert same(tensors(resumed), tensors(settings.erase(model, CAT)))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        settings.erase(model, CAT, seed=1, checkpoint=tmp_path)


# -- settings and wrong input ----------------------------------------------------------------------------------------


def test_settings_survive_json():
    for eraser in (RealEra(), QUICK, RealEra(near_distance=3.0, tokens="last")):
        assert RealEra.from_settings(json.loads(json.dumps(dataclasses.asdict(eraser)))) == eraser


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"tokens": "all"}, "tokens must be one of last, last.rest, got 'all'"),
        ({"ridge": 0.0, "rank": 0}, "ridge, rank must be positive"),
        ({"near": -1, "keep_weight": float("nan")}, "near, keep_weight must be finite"),
        ({"near_cosines": (0.9, 0.8)}, "Cosines lie in -1..1"),
        ({"far_cosines": (0.0, 0.85)}, "far ones below near ones"),
        ({"near_cosines": (0.9, 1.1)}, "Cosines lie in -1..1"),
        ({"near_distance": 0.0}, "near_distance must be positive"),
        ({"guidance": float("inf")}, "guidance must be finite"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RealEra(**settings)


@pytest.mark.parametrize(
    "settings,concepts,message",
    [
        (QUICK, [CAT, CAT], "more than once: cat"),
        (QUICK, [CAT, Concept("bird")], "retained as well: bird"),
        (QUICK, Concept("cat", anchor="cat"), "an anchor as well: cat"),
        (change(near_distance=0.1, near_cosines=(0.7, 0.8)), CAT, "near_cosines ends at 0.8"),
        (QUICK, Concept("cat", retain=("gold " * 40,)), "has 42 tokens"),
    ],
)
def test_a_wrong_task_is_one_clear_error_before_anything_changes(settings, concepts, message):
    model = tiny_pipeline()
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        settings.erase(model, concepts)
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and len(said) < 300
    assert same(before, state(model)) and not model.applied


# -- on a trained model ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_dog_goes_and_the_others_stay():
    model, dog = load(emoji.NAME), Concept.load(tasks_folder() / "concepts" / "dog.toml")
    edit = RealEra(steps=2, sampling_steps=4).erase(model, dog)
    suite = short_benchmark(dog)
    fewer = {"objects": (*suite.objects[:16], "castle"), "images": 12, "images_general": 1, "seed": 5}
    found = evaluate_images(model, suite.model_copy(update=fewer), emoji.judges(), dog, edit=edit)
    assert found["target", "Acc_e"].unedited >= 0.8 and found["target", "Acc_e"].value <= 0.1
    assert found["general", "Acc_g"].value < 0.5 * found["general", "Acc_g"].unedited
    assert found["others", "Acc_s"].value >= 0.9 * found["others", "Acc_s"].unedited
