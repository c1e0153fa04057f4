"""UCE: the shared map is the published loop of every layer; rows, settings, errors; behaviour on tiny pipelines."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from benchmarks.published_uce import edited, orthogonal
from hosts import CLIP_TOKENS, PIPELINES, same, state, tiny_pipeline

from conceptx import Concept, Edit, load
from conceptx.edit import LowRank
from conceptx.methods import UCE
from conceptx.methods.uce import (
    DEBIASING,
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    attribute_weights,
    debias,
    debiased,
    without,
)
from conceptx.progress import heard_by
from conceptx.testbeds import emoji

CAT = Concept("cat", kind="object", anchor="apple tree", retain=("bird", "iron"), synonyms=("kitten",))
# Sums of 1e3 float64 products of size 10, divided by a ridge of 0.5: 1e-16 becomes 1e-12; two digits of room.
CLOSE = {"rtol": 0, "atol": 1e-10}


def many(count):
    """Concepts with unlike names and anchors, and their retained neighbours."""
    return [
        Concept(f"metal {n}", anchor="" if n % 3 else f"garden {n}", retain=(f"bird {n}", f"ball {n}"))
        for n in range(count)
    ]


class Rows:
    """The rows of prompts counted by hand: begin token 0, a prompt of n tokens 1..n, then the end token and padding."""

    def __init__(self, model):
        self.model, self.tokenizer = model, model.pipeline.tokenizer

    def all(self, prompt):
        return self.model.encode([prompt]).states[0].double()

    def last(self, prompt):
        return max(len(self.tokenizer(prompt).input_ids) - 2, 1)  # "": the end token, where the authors have 0

    def pair(self, old, new, stop=None):
        """From the last subject token on, both cut at the tail to equal lengths."""
        first, second = self.all(old)[self.last(old) :], self.all(new)[self.last(new) :]
        rows = min(len(first), len(second)) if stop is None else stop
        return first[:rows], second[:rows]


@cache
def sd1():
    """In float64, so that a prompt's rows do not depend on which others are encoded with it."""
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)
    return model


def weights(model, edit):
    """projection -> (original, edited) in float64."""
    folded = edit.fold(model)
    found = {}
    for projection in model.projections:
        weight = model.parameter(f"{projection}.weight").double()
        found[projection] = (weight, folded.deltas[f"{projection}.weight"].added_to(weight))
    assert len(folded.deltas) == len(found) and not folded.maps  # nothing else changes
    return found


def assert_published(model, edit, prompts, retained, **settings):
    for before, after in weights(model, edit).values():
        torch.testing.assert_close(after, edited(before, prompts, retained, **settings), **CLOSE)
        assert (after - before).abs().max() > 1e-3


# -- theorems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_map_is_the_published_loop_of_every_layer(count):
    model, concepts = sd1(), many(count)
    rows = Rows(model)
    prompts = [rows.pair(c.name, c.anchor) for c in concepts]
    retained = [rows.all(text) for text in ["", *(name for c in concepts for name in c.retain)]]
    edit = UCE().erase(model, concepts)
    assert list(edit.maps) == ["text"] and not edit.deltas
    assert edit.provenance[0]["beta"] == max(0.1, 1 / (2 * count + 1))  # 1, 1/3, 0.1, ...: by the spec's table
    assert_published(model, edit, prompts, retained)


def test_beta_is_one_when_only_the_empty_prompt_is_retained():
    edit = UCE().erase(sd1(), Concept("cat"))
    rows = Rows(sd1())
    assert edit.provenance[0]["beta"] == 1
    assert_published(sd1(), edit, [rows.pair("cat", "")], [rows.all("")], beta=1.0)


def test_every_setting_reaches_the_formula():
    rows = Rows(sd1())
    eraser = UCE(tokens="last", retain_tokens="last", erase_weight=3.0, retain_weight=0.7, ridge=0.2)
    prompts = [rows.pair("cat", "apple tree", stop=1)]
    retained = [rows.all(text)[rows.last(text)][None] for text in ("", "bird", "iron")]
    assert_published(sd1(), eraser.erase(sd1(), CAT), prompts, retained, alpha=3, beta=0.7, ridge=0.2)


def test_templates_and_synonyms_add_prompts_with_the_anchor_in_the_same_form():
    rows = Rows(sd1())
    eraser = UCE(templates=("{}", "the {} eats"), synonyms=True, tokens="last")

    def row(text, up_to_the_name):  # the name's last token ends the prompt that is cut behind it
        return rows.all(text)[rows.last(up_to_the_name)][None]

    target = row("the apple tree eats", "the apple tree")
    prompts = [
        rows.pair("cat", "apple tree", stop=1),
        (row("the cat eats", "the cat"), target),
        rows.pair("kitten", "apple tree", stop=1),
        (row("the kitten eats", "the kitten"), target),
    ]
    assert_published(sd1(), eraser.erase(sd1(), CAT), prompts, [rows.all(text) for text in ("", "bird", "iron")])


def test_all_tokens_begin_after_the_beginning_token():
    rows = Rows(sd1())
    cut = CLIP_TOKENS - 1
    prompts = [(rows.all("grandmother")[1:][:cut], rows.all("cat")[1:][:cut])]
    edit = UCE(tokens="all").erase(sd1(), Concept("grandmother", anchor="cat"))
    assert_published(sd1(), edit, prompts, [rows.all("")])


def test_the_orthogonal_form_is_the_published_one():
    rows = Rows(sd1())
    edit = UCE(form="orthogonal").erase(sd1(), [CAT, Concept("lead")])
    prompts = [rows.pair("cat", "apple tree"), rows.pair("lead", "")]
    retained = [rows.all(text) for text in ("", "bird", "iron")]
    assert not edit.maps and all(isinstance(delta, LowRank) for delta in edit.deltas.values())
    assert_published(sd1(), edit, prompts, retained, target=orthogonal)


def test_an_orthogonal_target_has_no_part_along_the_block_and_keeps_the_rest():
    block, anchor = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    target = without(anchor, block)
    assert abs(float((target * block).sum())) < 1e-12
    off = anchor - (anchor * block).sum() / block.square().sum() * block
    torch.testing.assert_close(target, off)


def test_the_moderate_form_is_the_replacement_by_the_empty_prompt_whatever_the_anchor():
    edit = UCE(form="moderate", templates=("{}", "the {} eats")).erase(sd1(), CAT)
    bare = UCE(templates=("{}", "the {} eats")).erase(sd1(), CAT.model_copy(update={"anchor": None}))
    for found, wanted in zip(*(tensors.maps["text"] for tensors in (edit, bare)), strict=True):
        assert torch.equal(found.write, wanted.write) and torch.equal(found.read, wanted.read)
    rows = Rows(sd1())
    prompts = [rows.pair("cat", "")]
    retained = [rows.all(text) for text in ("", "bird", "iron")]
    assert_published(sd1(), UCE(form="moderate").erase(sd1(), CAT), prompts, retained)


def test_the_debias_form_adds_scaled_directions():
    rows, shifts = Rows(sd1()), (("bread", 0.1), ("soup", -0.05))

    def target(weight, block, _):
        wanted = block @ weight.T
        for prompt, shift in shifts:
            direction = rows.all(prompt)[rows.last(prompt) :][: len(block)] @ weight.T
            wanted = wanted + shift * (block @ weight.T).norm() * direction / direction.norm()
        return wanted

    edit = UCE(form="debias", attributes=shifts, retain_weight=0.1).erase(sd1(), Concept("iron", retain=("gold",)))
    shortest = CLIP_TOKENS - max(rows.last(text) for text in ("iron", "bread", "soup"))
    prompts = [rows.pair("iron", "iron", stop=shortest)]
    assert_published(sd1(), edit, prompts, [rows.all(text) for text in ("", "gold")], beta=0.1, target=target)


def test_a_debiasing_round_moves_towards_the_wanted_shares():
    observed, wanted = {"bread": 0.2, "soup": 0.8}, {"bread": 0.5, "soup": 0.5}
    first = attribute_weights(observed, wanted)
    assert dict(first) == pytest.approx({"bread": 0.03, "soup": -0.03})
    again = attribute_weights({"bread": 0.4, "soup": 0.6}, wanted, before=dict(first))
    assert dict(again) == pytest.approx({"bread": 0.04, "soup": -0.04})
    assert attribute_weights(wanted, wanted) == (("bread", 0.0), ("soup", 0.0))
    with pytest.raises(ValueError, match=r"observed of \['bread'\] and are wanted of \['bread', 'soup'\]"):
        attribute_weights({"bread": 1.0}, wanted)
    block = torch.ones(2, 3).double()
    torch.testing.assert_close(debiased(block, [block, 5 * block], [0.1, 0.2]), 1.3 * block)  # only directions count


def test_the_order_of_the_concepts_does_not_matter():
    first, second = (UCE().erase(sd1(), concepts).maps["text"][0] for concepts in (many(5), many(5)[::-1]))
    change = first.write @ first.read
    torch.testing.assert_close(second.write @ second.read, change, **CLOSE)
    assert change.abs().max() > 1e-2


def test_the_rank_is_one_a_concept_or_all_of_the_width():
    for count, rank in ((1, 1), (7, 7), (40, 32)):
        edit = UCE(tokens="last").erase(sd1(), many(count))
        assert edit.maps["text"][0].rank == rank
        assert {len(delta.down) for delta in edit.fold(sd1()).deltas.values()} == {rank}
    assert {len(d.down) for d in UCE(form="orthogonal").erase(sd1(), many(40)).deltas.values()} == {32}


def test_without_ridge_and_conflict_the_target_is_met_and_retained_rows_stay():
    rows = Rows(sd1())
    shared = UCE(tokens="last", retain_tokens="last", ridge=1e-9).erase(sd1(), CAT).maps["text"][0]
    old, new = rows.pair("cat", "apple tree", stop=1)
    # 4 rows in 32 dimensions; the smallest eigenvalue of their Gram matrix is above 0.1, so the ridge leaves 1e-8
    torch.testing.assert_close(shared(old), new, rtol=0, atol=1e-7)
    for text in ("", "bird", "iron"):
        kept = rows.all(text)[rows.last(text)][None]
        torch.testing.assert_close(shared(kept), kept, rtol=0, atol=1e-7)
    assert (new - old).abs().max() > 0.1


# -- on pipelines --------------------------------------------------------------------------------------------------


@torch.no_grad()
def noise(model, prompt):
    latents = model.noise([3])
    return model.predict(latents, 500.0, model.encode([prompt]))


def far(first, second):
    return float((first - second).norm())


@pytest.mark.parametrize("form", ["replace", "moderate", "orthogonal", "debias"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_host_stays_and_undo_save_and_fold_hold_on_every_architecture(kind, form, tmp_path):
    model = tiny_pipeline(kind)
    before, said, random_state = state(model), noise(model, "cat"), torch.get_rng_state()
    attributes = (("bread", 0.3), ("soup", -0.3)) if form == "debias" else ()
    edit = UCE(form=form, attributes=attributes).erase(model, CAT)
    assert same(before, state(model)) and torch.equal(said, noise(model, "cat")) and not model.applied
    assert torch.equal(random_state, torch.get_rng_state())
    edit.save(tmp_path)
    with edit.applied(model):
        wanted = noise(model, "cat")
    with Edit.load(tmp_path).applied(model):
        assert torch.equal(noise(model, "cat"), wanted)
    with edit.fold(model).applied(model):
        # float32 weights of size 1 rounded once (6e-8) on rows of size 10, through a few layers
        torch.testing.assert_close(noise(model, "cat"), wanted, rtol=0, atol=1e-4)
    assert (wanted - said).abs().max() > 1e-3
    assert same(before, state(model)) and torch.equal(said, noise(model, "cat"))


@pytest.mark.parametrize("form", ["replace", "orthogonal"])
def test_an_edit_of_rank_one_is_saved(form, tmp_path):
    """A column is a transposed row: contiguous by its strides, yet not to be read as bytes."""
    edit = UCE(form=form, tokens="last").erase(sd1(), Concept("cat"))
    edit.save(tmp_path)
    loaded = Edit.load(tmp_path).fold(sd1()).deltas
    folded = edit.fold(sd1()).deltas
    assert all(torch.equal(loaded[name].up, delta.up) and delta.up.shape[1] == 1 for name, delta in folded.items())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "flux"])
def test_the_target_becomes_the_anchor_and_the_retained_stay(kind):
    """SD 3 is left out: its T5 rows, and a pooled vector that alone decides much, are not UCE's to edit."""
    model = tiny_pipeline(kind)
    names = ("cat", "apple tree", "bird", "")
    before = {name: noise(model, name) for name in names}
    with UCE(ridge=1e-3, retain_weight=10.0).erase(model, CAT).applied(model):
        after = {name: noise(model, name) for name in names}
    moved = far(after["cat"], before["cat"])
    assert far(after["bird"], before["bird"]) < moved / 2 and far(after[""], before[""]) < moved / 2
    assert far(after["cat"], before["apple tree"]) < far(before["cat"], before["apple tree"])


def test_on_sd3_the_rows_of_its_other_tokenizer_are_no_keys():
    model = tiny_pipeline("sd3")
    edit = UCE().erase(model, Concept("cat"))
    count = edit.maps["text"][0].rank
    assert count == CLIP_TOKENS - Rows(model).last("cat") and count < model.encode(["cat"]).states.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan_in_either_precision(dtype):
    model = tiny_pipeline("sd1")
    model.pipeline.to(dtype)
    edit = UCE().erase(model, many(3))
    with edit.applied(model):
        assert bool(noise(model, "metal 1").isfinite().all())
    assert edit.maps["text"][0].read.dtype == torch.float64


def test_the_record_names_what_was_used():
    (record,) = UCE(tokens="last").erase(sd1(), many(2)).provenance
    assert record["method"] == "UCE" and record["concept"] == "metal 0, metal 1"
    assert UCE.from_settings(json.loads(json.dumps(record["settings"]))) == UCE(tokens="last")
    assert set(record["versions"]) == {"conceptx", "diffusers", "torch", "transformers"}


# -- settings and errors -------------------------------------------------------------------------------------------


def test_settings_survive_json():
    shifted = UCE(form="debias", attributes=(("man", 0.1), ("woman", -0.1)), templates=OBJECT_TEMPLATES)
    for eraser in (UCE(), UCE(form="moderate"), shifted, UCE(templates=STYLE_TEMPLATES)):
        assert UCE.from_settings(json.loads(json.dumps(dataclasses.asdict(eraser)))) == eraser


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"erase_weight": float("nan"), "retain_weight": -1.0}, "erase_weight, retain_weight must be positive"),
        ({"templates": ("photo",)}, "must contain {} once"),
        ({"templates": ()}, "must contain {} once"),
        ({"form": "debias"}, "needs attributes"),
        ({"attributes": (("man", 0.1),)}, "no other, needs attributes"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        UCE(**settings)


@pytest.mark.parametrize(
    "concepts,message",
    [
        ([], "No concept was given"),
        ([Concept("cat"), Concept("Cat", anchor="dog")], "more than once: cat"),
        ([Concept("cat"), Concept("dog", retain=("Cat",))], "retained as well: Cat"),
        ([Concept("cat", synonyms=("kitten",)), Concept("dog", retain=("kitten",))], "retained as well: kitten"),
        ([Concept("cat", anchor="CAT")], "an anchor as well: CAT"),
        ([Concept("cat", synonyms=("kitten",), anchor="kitten")], "an anchor as well: kitten"),
        ([Concept("cat"), Concept("dog", anchor="cat")], "an anchor as well: cat"),
        ([Concept("the cat sleeps under the apple tree all day and all night and then wakes up")], "tokens"),
        ([Concept("cat", retain=("bird " * 30,))], "tokens"),
    ],
)
def test_a_wrong_task_is_one_clear_error_before_anything_changes(concepts, message):
    before = state(sd1())
    with pytest.raises(ValueError, match=message):
        UCE().erase(sd1(), concepts)
    assert same(before, state(sd1())) and not sd1().applied


def test_an_edit_in_force_is_refused():
    model = tiny_pipeline("sd1")
    with UCE().erase(model, CAT).applied(model), pytest.raises(ValueError, match="An edit is in force"):
        UCE().erase(model, CAT)


# -- the debiasing loop ------------------------------------------------------------------------------------------------

IRON, BREAD, SOUP = Concept("iron", prompts=("hot iron", "soft iron")), "bread", "soup"
TASTES = (BREAD, SOUP)


class Painter:
    """Draws with the edit in force: the share of images with attribute 0 is a known function of its weight a_0.

    An image is one pixel: the attribute's number. What was asked is remembered.
    """

    def __init__(self, model, share):
        self.model, self.share, self.asked, self.seeds = model, share, [], []

    def __call__(self, prompts, *, seeds, **options):
        (record,) = self.model.applied[-1].edit.provenance
        shifts = dict(record["settings"]["attributes"])
        self.asked.append((tuple(prompts), options))
        self.seeds.append(tuple(seeds))
        first = round(len(prompts) * min(max(self.share(shifts[BREAD]), 0), 1))
        return (torch.arange(len(prompts)) >= first).float().reshape(-1, 1, 1, 1)


def judge(images):
    return images.flatten().int()


def painted(monkeypatch, share, **settings):
    model = tiny_pipeline("sd1")
    painter = Painter(model, share)
    monkeypatch.setattr(model, "generate", painter)
    return debias(model, IRON, TASTES, judge=judge, images=100, **settings), painter, model


def test_the_loop_converges_and_stops_below_the_tolerance(monkeypatch):
    """share(a) = 0.2 + 2 a, step 0.1: the gap shrinks by 1 - 0.2 in each round, so 0.3 * 0.8^9 < 0.05 is the tenth."""
    before = state(tiny_pipeline("sd1"))
    found, painter, model = painted(monkeypatch, lambda a: 0.2 + 2 * a)
    gaps = [r.gap for r in found.rounds]
    assert gaps == pytest.approx([0.3 * 0.8**n for n in range(len(gaps))], abs=0.011)  # of 100 images
    assert len(gaps) < 12 and gaps[-1] < 0.05 <= gaps[-2] and found.best == len(gaps) - 1
    assert dict(found.rounds[0].weights) == {BREAD: 0, SOUP: 0} and found.rounds[0].shares == {BREAD: 0.2, SOUP: 0.8}
    for earlier, later in zip(found.rounds, found.rounds[1:], strict=False):
        wanted = {p: earlier.weights[p] + 0.1 * (0.5 - earlier.shares[p]) for p in TASTES}
        assert dict(later.weights) == pytest.approx(wanted)
    assert {asked for asked, _ in painter.asked} == {("hot iron", "soft iron") * 50}
    assert len({seed for seeds in painter.seeds for seed in seeds}) == 100 * len(gaps)  # every round has its own
    assert same(before, state(model)) and not model.applied


def test_the_edit_is_the_solve_of_the_best_round(monkeypatch):
    """share(a) = 0.2 + 25 a with a step of 0.1 overshoots further in each round: the first stays the best."""
    found, _, model = painted(monkeypatch, lambda a: 0.2 + 25 * a, rounds=4)
    assert found.best == 0 and len(found.rounds) == 4 and found.rounds[1].gap > found.rounds[0].gap
    assert all(not (delta.up @ delta.down).any() for delta in found.edit.deltas.values())  # the original model
    found, _, model = painted(monkeypatch, lambda a: 0.2 + 12 * a, rounds=2)
    settings = dataclasses.replace(DEBIASING, form="debias", attributes=tuple(found.rounds[1].weights.items()))
    again = settings.erase(model, IRON)
    assert found.best == 1 and found.edit.deltas.keys() == again.deltas.keys()
    assert all(
        torch.equal(delta.up, again.deltas[n].up) and torch.equal(delta.down, again.deltas[n].down)
        for n, delta in found.edit.deltas.items()
    )
    assert any((delta.up @ delta.down).abs().max() > 1e-3 for delta in found.edit.deltas.values())


def test_shares_may_be_wanted_unequal_and_settings_pass_through(monkeypatch):
    listened = []
    with heard_by(lambda *heard: listened.append(heard)):
        found, painter, _ = painted(
            monkeypatch, lambda a: 0.5 + a, wanted={BREAD: 0.7, SOUP: 0.3}, step=0.5, tolerance=0.02, steps=7,
            eraser=UCE(tokens="last"),
        )  # fmt: skip
    assert found.rounds[-1].shares == pytest.approx({BREAD: 0.7, SOUP: 0.3}, abs=0.02)
    assert found.edit.provenance[0]["settings"]["tokens"] == "last" and painter.asked[0][1] == {"steps": 7}
    assert [heard[:3] for heard in listened if heard[0] == "debiasing"] == [
        ("debiasing", n + 1, 30) for n in range(len(found.rounds))
    ]


def test_a_name_is_asked_for_where_the_concept_has_no_prompts(monkeypatch):
    model = tiny_pipeline("sd1")
    painter = Painter(model, lambda a: 0.5)
    monkeypatch.setattr(model, "generate", painter)
    found = debias(model, Concept("iron"), TASTES, judge=judge, images=6)
    assert len(found.rounds) == 1 and painter.asked == [(("iron",) * 6, {})]


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"attributes": ("bread",)}, "takes a list of two attributes or more, each once, got"),
        ({"attributes": ("bread", "bread")}, "takes a list of two attributes or more"),
        ({"attributes": "bread"}, "takes a list of two attributes or more"),
        ({"wanted": {"bread": 1.0}}, "wanted must hold a share of each of"),
        ({"wanted": {"bread": 0.7, "soup": 0.4}}, "that add up to 1"),
        ({"wanted": {"bread": 1.5, "soup": -0.5}}, "that add up to 1"),
        ({"rounds": 0, "step": float("nan")}, "rounds, step must be positive and finite"),
        ({"judge": lambda images: [0]}, r"must answer 0\.\.1 for each of 4 images, got 1 answers of \[0\]"),
        ({"judge": lambda images: [0, 1, 2, 1]}, r"got 4 answers of \[0, 1, 2\]"),
        ({"attributes": ("bread " * 40, "soup")}, "tokens"),
    ],
)
def test_wrong_debiasing_is_one_clear_error_before_anything_changes(settings, message):
    model = tiny_pipeline("sd1")
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        debias(model, Concept("iron"), **({"attributes": TASTES, "judge": judge, "images": 4, "steps": 1} | settings))
    assert same(before, state(model)) and not model.applied and str(caught.value).endswith(".")


@pytest.mark.slow
def test_an_emoji_of_a_dog_comes_in_all_styles():
    """Without a word of style most are fluent; on seeds that the loop has not seen the edit spreads them out."""
    model, judges = load(emoji.NAME), emoji.judges()
    dog, options = Concept("dog", prompts=("a dog",)), {"steps": 10}
    solve = UCE(retain_weight=0.1, templates=("{}", "a {}", "an emoji of a {}"))

    def styles(images):
        return judges.styles(images).argmax(1)

    found = debias(
        model, dog, emoji.STYLE_NAMES, judge=styles, rounds=4, images=64, tolerance=0.08, step=0.5, eraser=solve,
        **options,
    )  # fmt: skip
    with found.edit.applied(model):
        drawn = model.generate(["a dog"] * 64, seeds=range(10**6, 10**6 + 64), **options)
    shares = torch.bincount(styles(drawn), minlength=4) / 64
    assert found.rounds[0].gap > 0.4 and (shares - 0.25).abs().max() < 0.25
    assert (judges.objects(drawn).argmax(1) == judges.object_names.index("dog")).float().mean() > 0.9
