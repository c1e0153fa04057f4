"""RECE: two matrices stand for all layers, the rounds are the published loop, what drifts and what bounds it."""

import dataclasses
from functools import cache

import pytest
import torch
from benchmarks import published_rece, published_uce
from hosts import tiny_pipeline
from methods.on_emoji import dog, scores

from conceptx import Concept, load
from conceptx.geometry import ConceptMap, WeightedRows, replacement
from conceptx.methods import RECE, UCE
from conceptx.methods.rece import Search, condensed, output_gram

CAT = Concept("cat", kind="object", anchor="apple tree", retain=("bird", "iron"))
WIDTH = 48
REGULARISERS = ("zero", "standard", "surrogate_outputs", "surrogate_rows", "surrogate_both")


def random_rows(seed, count):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


@cache
def layers():
    """32 matrices as an attention has them, keys and values."""
    outs = [16] * 10 + [32] * 10 + [64] * 12
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out, WIDTH, generator=generator).double() * WIDTH**-0.5 for out in outs]


def search(concepts=2, retained=30):
    rows, harmless, kept = (random_rows(seed, n) for seed, n in enumerate((concepts, concepts, retained)))
    return Search(output_gram(layers()), rows, harmless, kept)


def some_map():
    """Of rank 3."""
    return ConceptMap(random_rows(10, 3).T / 3, random_rows(11, 3) / 3, torch.zeros(WIDTH).double())


def through(weights, concept_map):
    return [concept_map.fold(weight)[0] for weight in weights]


# -- theorems ------------------------------------------------------------------------------------------------------


def test_two_matrices_stand_for_all_layers():
    task, edited = search(), through(layers(), some_map())
    expected = task.rows @ published_rece.inversion(layers(), edited, 0.1).T
    found = task.invert(some_map(), 0.1)
    # sums of 48 products of size 1, a condition of about 1e3: 1e-13; the spec's own check was 5e-15
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - task.rows).abs().max() > 0.1


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_inversion_is_the_least_squares_solution_of_all_layers_stacked(regulariser):
    task, edited, root = search(), through(layers(), some_map()), 0.3**0.5
    left, right = list(edited), [weight @ task.rows.T for weight in layers()]
    if regulariser in ("surrogate_outputs", "surrogate_both"):
        left += [root * weight for weight in edited]
        right += [root * weight @ task.rows.T for weight in edited]
    if regulariser != "surrogate_outputs":
        towards = {"zero": 0 * task.rows, "standard": task.harmless}.get(regulariser, task.rows)
        left.append(root * torch.eye(WIDTH).double())
        right.append(root * towards.T)
    expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    torch.testing.assert_close(task.invert(some_map(), 0.3, regulariser), expected, rtol=0, atol=1e-10)


def test_the_regularisers_differ():
    found = [search().invert(some_map(), 0.3, regulariser) for regulariser in REGULARISERS]
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(found) for b in found[:n])


@cache
def sd1():
    model = tiny_pipeline("sd1")
    model.pipeline.to(torch.float64)  # a prompt's rows then do not depend on which others are encoded with it
    return model


def block(prompt):
    return sd1().encode([prompt]).states[0]


def from_last(prompt, name):
    return block(prompt)[sd1().subject_end(prompt, name) :]


@pytest.mark.parametrize("rounds,rho", [(1, 0.1), (3, 0.1), (2, 1e-3)])
def test_the_map_is_the_published_loop_of_every_layer(rounds, rho):
    weights = [sd1().parameter(f"{name}.weight").detach() for name in sd1().projections]
    old, new = from_last("cat", "cat"), from_last("apple tree", "tree")
    pair = (old[: len(new)], new[: len(old)])
    retained = [block(text) for text in ("", "bird", "iron")]
    started = [published_uce.edited(weight, [pair], retained) for weight in weights]
    blocks = [(block("cat"), block("apple tree"))]
    expected = published_rece.edited(weights, started, blocks, retained, rounds=rounds, rho=rho)
    edit = RECE(rounds=rounds, inversion_ridge=rho).erase(sd1(), CAT)
    assert list(edit.maps) == ["text"] and not edit.deltas
    for before, start, after, found in zip(
        weights, started, expected, through(weights, edit.maps["text"][0]), strict=True
    ):
        # weights of size 1; rows of size 10, inverted with a ridge of rho: 1e-16 becomes 1e-9
        torch.testing.assert_close(found, after, rtol=0, atol=1e-7)
        assert (after - before).abs().max() > 1e-2 and (after - start).abs().max() > 1e-4


def standing(**settings):
    eraser, task = RECE(tokens="last", **settings), search()
    found, rounds = eraser.solve(task, WeightedRows.of(task.rows), task.harmless, 0.1)
    return found, rounds, task


@pytest.mark.parametrize("reference", ["current", "original"])
def test_each_round_makes_the_concept_harder_to_find_and_moves_what_is_retained(reference):
    found, rounds, task = standing(rounds=4, reference=reference)
    errors, drifts = zip(*((r["regeneration_error"], r["retained_drift"]) for r in rounds), strict=True)
    assert len(rounds) == 5 and errors[1] > errors[0] + 0.05 and drifts[-1] > drifts[0] > 0
    assert errors[-1] - errors[-2] < errors[1] - errors[0]  # less and less is won
    moved = sum((weight @ (found(task.kept) - task.kept).T).square().sum() for weight in layers())
    size = sum((weight @ task.kept.T).square().sum() for weight in layers())
    assert drifts[-1] == pytest.approx(float((moved / size).sqrt()), rel=1e-9)


def test_from_the_original_weights_the_rounds_are_one_solve_whose_cost_bounds_the_drift():
    found, _, task = standing(rounds=2, reference="original")
    keys, targets, weight = task.rows, task.harmless, 0.1
    current = replacement(WeightedRows.of(keys), targets, WeightedRows.of(task.kept, weight), UCE().ridge)
    for _ in range(2):
        keys = torch.cat([keys, task.invert(current, 0.1)])
        targets = torch.cat([targets, task.harmless])
        current = replacement(WeightedRows.of(keys), targets, WeightedRows.of(task.kept, weight), 0.1)
    torch.testing.assert_close(found(task.rows), current(task.rows), rtol=0, atol=1e-9)
    drift = sum((w @ (found(task.kept) - task.kept).T).square().sum() for w in layers())
    cost = sum((w @ (targets - keys).T).square().sum() for w in layers())
    assert 0 < weight * drift <= cost


def test_a_heavy_inversion_ridge_leaves_nothing_to_erase():
    start = UCE().erase(sd1(), CAT).maps["text"][0]
    found = RECE(inversion_ridge=1e12).erase(sd1(), CAT).maps["text"][0]
    # the rows found are about 1e-9 long, and so are the changes that they ask for
    torch.testing.assert_close(found(block("cat")), start(block("cat")), rtol=0, atol=1e-6)


def test_many_retained_rows_are_condensed_to_as_many_as_dimensions():
    rows = random_rows(3, 500)
    few = condensed(rows)
    assert few.shape == (WIDTH, WIDTH) and condensed(rows[:10]) is not few
    torch.testing.assert_close(few.T @ few, rows.T @ rows, rtol=0, atol=1e-9)
    torch.testing.assert_close(condensed(rows[:10]), rows[:10])


# -- on pipelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["block", "last", "last+rest", "all"])
def test_which_rows_are_erased(tokens):
    count = {"block": len(block("cat")), "last": 1, "last+rest": len(from_last("apple tree", "tree"))}.get(
        tokens, len(block("cat")) - 1
    )
    rows, harmless = RECE(tokens=tokens)._rows(sd1(), [CAT])
    assert len(rows) == len(harmless) == count
    first = {"block": 0, "all": 1}.get(tokens, sd1().subject_end("cat", "cat"))
    torch.testing.assert_close(rows, block("cat")[first:][:count])


def test_the_edit_is_made_for_the_text_encoders_and_records_how_it_stood():
    edit = RECE(rounds=2).erase(sd1(), [CAT, Concept("gold")])
    assert edit.host.parts.keys() == {"text_encoder"}
    (record,) = edit.provenance
    assert len(record["standing"]) == 3 and record["beta"] == pytest.approx(1 / 3)
    assert RECE.from_settings(record["settings"]) == RECE(rounds=2)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"inversion_ridge": 0.0, "ridge": float("inf")}, "inversion_ridge, ridge must be positive"),
        ({"regulariser": "none"}, "regulariser must be one of zero, standard"),
        ({"tokens": "first"}, "tokens must be one of block"),
        ({"reference": "old"}, "reference must be one of current, original"),
        ({"start": UCE(form="orthogonal")}, "starts from UCE's replace form"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RECE(**settings)


def test_settings_of_the_start_survive_a_recipe():
    eraser = RECE(start=UCE(tokens="last", templates=("{}", "a {}")))
    assert RECE.from_settings(dataclasses.asdict(eraser)) == eraser


def test_the_dog_is_gone_and_the_others_stay():
    model = load("testbed:emoji")
    found = scores(model, RECE(tokens="last").erase(model, dog()))
    assert found["dog"] <= 0.1 * found["dog before"] and found["others"] >= 0.8 * found["others before"]
