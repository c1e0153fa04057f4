"""SPEED: the plain loop of its description, a least-squares referee for the constraints, and the emoji model."""

import dataclasses
from functools import cache

import pytest
import torch
from benchmarks import published_speed
from hosts import GARDEN, METALS, same, state, tiny_pipeline
from methods.on_emoji import dog, scores

from conceptx import Concept, load
from conceptx.geometry.null_space import quiet_directions
from conceptx.methods import SPEED
from conceptx.methods.speed import mean_moments, retained_names

CAT = Concept("cat", kind="object", anchor="bread", retain=("bird", "iron", "apple tree"))
WIDTH = 24


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def fading(seed, count):
    """Rows whose principal values fall from 3 to 0.02, so that a threshold of 0.05 leaves about half the dimensions."""
    return 3 * random(seed, count, WIDTH) * torch.logspace(0, -2.2, WIDTH).double()


def some_task(eraser, concepts=3, retained=60):
    rows = [fading(seed, count) for seed, count in enumerate((concepts, concepts, retained, 4), 1)]
    return eraser.task(*rows, concepts=concepts, seed=5)


def eraser(**settings):
    return SPEED(**{"null_threshold": 0.05, **settings})


def change(method, weight, task):
    up, down = method.change(weight, task)
    return up @ down


# -- the loop of the description -----------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [8, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filter": False, "ridge": 0.05},
        {"equality_slack": 0.5, "directions": 2},
        {"augmentations": 0},
        {"filter_scale": 1.3},
    ],
)
@pytest.mark.parametrize("concepts,retained", [(1, 60), (3, 60), (30, 60), (3, 9)])
def test_it_is_the_plain_loop_with_every_augmented_row_formed(out, settings, concepts, retained):
    method, weight = eraser(**settings), random(9, out, WIDTH)
    task = some_task(method, concepts, retained)
    directions = quiet_directions(weight, task.loudest)
    rows = {"keys": task.keys.rows, "anchors": task.anchors, "concepts": concepts}
    kept = published_speed.above(shifts(weight, task), method.filter_scale) | (not method.filter)
    full_steps = task.steps[kept] @ directions
    second, found = published_speed.refined(
        weight, retained=task.retained, steps=lambda first, last: full_steps[first:last],
        scale=method.filter_scale, filtered=method.filter, chunk=None, quiet=torch.eye(WIDTH).double(), **rows,
    )  # fmt: skip
    assert torch.equal(found, kept)
    expected = published_speed.edited(
        weight, second=second, invariants=task.invariants, tau=0.05, s=method.ridge, slack=method.equality_slack, **rows
    )
    # the loop inverts matrices of a condition of up to 1e6, where ours projects: 1e-16 becomes 1e-10
    torch.testing.assert_close(weight + change(method, weight, task), expected, rtol=0, atol=1e-7)
    assert (expected - weight).abs().max() > 1e-2


def shifts(weight, task):
    """How far the unconstrained edit moves each retained row (Eqs. 5-6), with an explicit inverse."""
    keys, anchors, count = task.keys.rows, task.anchors, len(task.anchors)
    own, cross = keys.T @ keys / count, anchors.T @ keys / count
    edit = weight @ (cross - own) @ torch.inverse(torch.eye(WIDTH).double() + own)
    return (task.retained @ edit.T).norm(dim=1)


def test_the_directions_steps_and_filter_all_count():
    weight = random(9, 8, WIDTH)
    plain = change(eraser(), weight, some_task(eraser()))
    for settings in ({"augmentations": 0}, {"filter": False}, {"directions": 2}, {"null_threshold": 0.5}):
        method = eraser(**settings)
        assert (change(method, weight, some_task(method)) - plain).abs().max() > 1e-4, settings


# -- theorems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [8, 40])
def test_retained_rows_and_invariants_do_not_move_at_all(out):
    method, weight = eraser(filter=False, null_threshold=1e-8), random(9, out, WIDTH)
    task = some_task(method, retained=7)
    moved = change(method, weight, task)
    for rows in (task.retained, task.invariants, quiet_directions(weight, task.loudest)):
        assert (rows @ moved.T).abs().max() < 1e-9
    assert (task.keys.rows @ moved.T).abs().max() > 0.1


def test_what_the_filter_lets_go_may_move():
    method, weight = eraser(null_threshold=1e-8), random(9, 40, WIDTH)
    task = some_task(method, retained=7)
    kept, moved = shifts(weight, task) >= shifts(weight, task).mean(), change(method, weight, task)
    assert 0 < int(kept.sum()) < 7
    assert (task.retained[kept] @ moved.T).abs().max() < 1e-9 < 1e-3 < (task.retained[~kept] @ moved.T).abs().max()


def test_no_feasible_change_is_better():
    """The constraints leave Delta = X N' with N orthonormal; X is then a ridge regression, solved by lstsq."""
    method, weight = eraser(filter=False, augmentations=0, null_threshold=1e-8, ridge=0.3), random(9, 40, WIDTH)
    task = some_task(method, retained=7)
    fixed = torch.cat([task.retained, task.invariants])
    free = torch.linalg.svd(fixed).Vh[len(fixed) :].T
    root = len(task.anchors) ** -0.5
    left = torch.cat([root * task.keys.rows @ free, 0.3**0.5 * torch.eye(free.shape[1]).double()])
    wanted = root * (task.anchors - task.keys.rows) @ weight.T
    right = torch.cat([wanted, torch.zeros(free.shape[1], len(weight)).double()])
    expected = torch.linalg.lstsq(left, right).solution.T @ free.T
    torch.testing.assert_close(change(method, weight, task), expected, rtol=0, atol=1e-10)


def test_a_smaller_ridge_erases_harder():
    weight = random(9, 40, WIDTH)

    def left(ridge):
        task = some_task(eraser(ridge=ridge))
        return (
            task.keys.rows @ (weight + change(eraser(ridge=ridge), weight, task)).T - task.anchors @ weight.T
        ).norm()

    assert left(0.05) < left(1.0) < left(20.0)


def test_with_slack_the_invariants_move_a_little():
    weight, moved = random(9, 40, WIDTH), []
    for slack in (0.0, 0.1, 10.0):
        task = some_task(eraser(equality_slack=slack))
        moved.append(float((task.invariants @ change(eraser(equality_slack=slack), weight, task).T).norm()))
    assert moved[0] < 1e-9 < 1e-4 < moved[1] < moved[2]


def test_invariants_among_the_retained_rows_are_no_constraint_twice():
    """Trap 6: P C2 is then zero, or has dependent rows."""
    method, weight = eraser(filter=False, augmentations=0, null_threshold=1e-8), random(9, 40, WIDTH)
    task = some_task(method, retained=7)
    again = dataclasses.replace(
        task, invariants=torch.cat([task.retained[:2], task.invariants[:1], task.invariants[:1]])
    )
    once = dataclasses.replace(task, invariants=task.invariants[:1])
    expected = change(method, weight, once)
    torch.testing.assert_close(change(method, weight, again), expected, rtol=0, atol=1e-10)
    inside = dataclasses.replace(task, invariants=task.retained[:2])
    assert (change(method, weight, inside) - expected).abs().max() > 1e-4


def test_the_mean_of_augmented_rows_without_forming_them():
    rows, steps, directions = random(1, 12, WIDTH), random(2, 12, 10, 2), torch.linalg.qr(random(3, WIDTH, 2)).Q.T
    joined = random(4, 12, 10) > 0.3
    every = torch.cat([rows, (rows[:, None] + steps @ directions)[joined]])
    few = mean_moments(rows, steps, joined, directions)
    assert len(few) == 14
    torch.testing.assert_close(few.T @ few, every.T @ every / len(every), rtol=0, atol=1e-12)


# -- on pipelines --------------------------------------------------------------------------------------------------


@cache
def sd1():
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)
    return model


def dense(edit):
    return {name: delta.up @ delta.down for name, delta in edit.deltas.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("projections,ends", [("values", {"to_v"}), ("keys", {"to_k"}), ("both", {"to_k", "to_v"})])
def test_which_matrices_change_and_by_what_rank(kind, projections, ends):
    model = tiny_pipeline(kind)
    edit = SPEED(projections=projections).erase(model, [CAT, Concept("gold")])
    assert {name.split(".")[-2] for name in edit.deltas} == ends and not edit.maps
    assert len(edit.deltas) == len([p for p in model.projections if p.endswith(tuple(ends))])
    assert {len(delta.down) for delta in edit.deltas.values()} == {2}


def test_what_is_kept_and_invariant_on_a_pipeline():
    method = SPEED(null_threshold=1e-8, filter=False)
    model, edit = sd1(), method.erase(sd1(), CAT)
    states = model.encode(["", *CAT.retain, "cat", "bread"]).states.double()
    last = [model.subject_end(name, name) for name in (*CAT.retain, "cat", "bread")]
    for name, moved in dense(edit).items():
        kept = [states[0, 0], *(states[n, row] for n, row in enumerate(last[:3], 1))]
        assert all((row @ moved.T).abs().max() < 1e-9 for row in kept)
        target = states[4, last[3]]
        weight, wanted = model.parameter(name).detach(), model.parameter(name).detach() @ states[5, last[4]]
        assert ((weight + moved) @ target - wanted).norm() < 0.9 * (weight @ target - wanted).norm()


def test_the_order_of_names_does_not_matter_and_the_seed_does():
    first, second = CAT, Concept("gold", anchor="", retain=("soup", "garden"))
    turned = CAT.model_copy(update={"retain": CAT.retain[::-1]})
    edit = dense(SPEED().erase(sd1(), [first, second]))
    again = dense(SPEED().erase(sd1(), [second, turned]))
    other = dense(SPEED().erase(sd1(), [first, second], seed=1))
    for name, moved in edit.items():
        torch.testing.assert_close(again[name], moved, rtol=0, atol=1e-9)
        assert moved.abs().max() > 1e-3
    assert any((other[name] - moved).abs().max() > 1e-6 for name, moved in edit.items())


def test_without_names_to_retain_the_empty_prompt_is_retained():
    (record,) = SPEED(tokens="all", ridge=0.7, equality_slack=0.5).erase(sd1(), Concept("iron")).provenance
    assert record["retained_rows"] == sd1().encode([""]).states.shape[1] - 1
    edit = SPEED(null_threshold=1e-8, filter=False).erase(sd1(), Concept("iron"))
    rows = sd1().encode([""]).states[0].double()
    assert all((rows @ moved.T).abs().max() < 1e-9 < 1e-3 < moved.abs().max() for moved in dense(edit).values())


def test_names_that_contain_an_erased_one_are_left_out():
    concepts = [Concept("dog", retain=("Hot Dog", "dogma", "cat")), Concept("tin", retain=("tin-opener", "cat"))]
    assert retained_names(concepts) == (["cat", "dogma"], ["Hot Dog", "tin-opener"])
    model = tiny_pipeline("sd1")
    (record,) = SPEED().erase(model, Concept("tree", retain=("apple tree", "bird"))).provenance
    assert record["left_out"] == ["apple tree"] and record["retained_rows"] == 1


def test_more_concepts_than_dimensions():
    words = sorted({word for text in (METALS[0], GARDEN[0]) for word in text.split()})
    concepts = [Concept(f"{a} {b}") for a in words[:6] for b in words[-6:]]
    edit = SPEED().erase(tiny_pipeline("sd1"), concepts)
    assert {len(delta.down) for delta in edit.deltas.values()} == {32}


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"null_threshold": 0.0, "ridge": -1.0}, "null_threshold, ridge must be positive"),
        ({"equality_slack": -1.0}, "equality_slack must be zero or positive"),
        ({"augmentations": -1}, "augmentations must be at least 0, got -1"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"projections": "value"}, "projections must be one of values, keys, both"),
        ({"tokens": "first"}, "tokens must be one of last"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SPEED(**settings)


@pytest.mark.parametrize(
    "settings,message", [({"directions": 32}, "below the width of the text, 32, got 32"), ({"centroids": 99}, "99")]
)
def test_what_does_not_fit_the_pipeline_is_refused(settings, message):
    before = state(sd1())
    with pytest.raises(ValueError, match=message):
        SPEED(**settings).erase(sd1(), CAT)
    assert same(before, state(sd1()))


def test_the_dog_is_gone_and_the_others_stay():
    model = load("testbed:emoji")
    found = scores(model, SPEED(tokens="last+rest").erase(model, dog()))
    assert found["dog"] <= 0.1 * found["dog before"] and found["others"] >= 0.8 * found["others before"]
