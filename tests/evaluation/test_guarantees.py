"""What is said of names without an image is what the projections of the edited pipeline do, read off by hooks."""

from contextlib import contextmanager

import pytest
import torch
from hosts import METALS, PIPELINES, same, state, tiny_pipeline

from conceptx import Concept, Edit
from conceptx.edit import Dense
from conceptx.evaluation.guarantees import guarantees
from conceptx.geometry import ConceptMap
from conceptx.methods import ESD, UCE

CAT = Concept("cat", anchor="apple tree", retain=("bird", "grandmother", "iron"))
TIN = Concept("tin", retain=("bird", "soup"))


def normal(*shape, seed=0, size=0.1):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def listening(model):
    """What the projections give, by hooks."""
    heard = {}
    modules = {path: model.module.get_submodule(path) for path in model.projections}
    hooks = [
        module.register_forward_hook(lambda _, __, out, path=path: heard.__setitem__(path, out.detach().double()))
        for path, module in modules.items()
    ]
    yield heard
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def outputs(model, name):
    """All that the denoiser's projections make of a prompt's last name token and end-of-text token: two rows."""
    prompts = model.encode([name])
    with listening(model) as heard:
        model.predict(model.noise([0]), 500.0, prompts)
    last = model.subject_end(name, name) if name else int(prompts.end[0])
    bias = {path: model.parameter(f"{path}.bias") for path in model.projections}
    plain = {path: out - (0 if bias[path] is None else bias[path].double()) for path, out in heard.items()}
    rows = [torch.cat([made[path][0, where] for path in model.projections]) for made in (heard, plain)
            for where in (last, int(prompts.end[0]))]  # fmt: skip
    return torch.stack(rows[:2]), torch.stack(rows[2:])


def told(model, edit, names):
    """name -> (outputs without the edit, with it), and the outputs without the edit and without biases."""
    before = {name: outputs(model, name) for name in names}
    with edit.applied(model):
        after = {name: outputs(model, name) for name in names}
    return {name: (before[name][0], after[name][0], before[name][1]) for name in names}


def gap(found, wanted, size):
    """Of the last token, and of the end of the text."""
    return ((found - wanted).norm(dim=1) / size.norm(dim=1)).tolist()


def assert_told(model, edit, concept=CAT):
    """Float32 forward passes: 1e-6 of the outputs, which are of norm one here."""
    anchor = concept.anchor or ""
    heard = told(model, edit, [*concept.retain, "", concept.name, anchor])
    found = guarantees(model, edit, concept)
    assert [line.name for line in found.retained] == ["", *concept.retain]
    for line in found.retained:
        before, after, size = heard[line.name]
        assert [line.after.last, line.after.end] == pytest.approx(gap(after, before, size), abs=1e-4)
        assert (line.before.last, line.before.end, line.before.text, line.anchor) == (0, 0, 0, None)
    (line,), (before, after, _), (goal, _, size) = found.erased, heard[concept.name], heard[anchor]
    assert (line.name, line.anchor) == (concept.name, anchor)
    assert [line.before.last, line.before.end] == pytest.approx(gap(before, goal, size), abs=1e-4)
    assert [line.after.last, line.after.end] == pytest.approx(gap(after, goal, size), abs=1e-4)
    return found


@pytest.mark.parametrize("kind", PIPELINES)
def test_maps_do_what_is_said(kind):
    model = tiny_pipeline(kind)
    before = state(model)
    found = assert_told(model, UCE().erase(model, CAT))
    assert same(before, state(model)) and not model.applied
    assert not found.uncovered and found.max > 1e-3
    assert found.max == max(line.after.last for line in found.retained) >= found.mean
    assert 4 * found.mean == pytest.approx(sum(line.after.last for line in found.retained))


@pytest.mark.parametrize("kind", ["sd1", "sd3"])
def test_weights_do_what_is_said_and_biases_too(kind):
    """SD 3's projection has a bias, SD 1's have none and get one."""
    model = tiny_pipeline(kind)
    deltas = {}
    for number, path in enumerate(model.projections):
        for part in ("weight", "bias"):
            name = f"{path}.{part}"
            deltas[name] = Dense(normal(*model.parameter_shape(name), seed=number))
    assert not assert_told(model, Edit(model.fingerprint, deltas=deltas)).uncovered


def test_folded_or_not_the_same_is_said():
    model = tiny_pipeline("sd1")
    edit = UCE().erase(model, [CAT, TIN])
    maps, folded = guarantees(model, edit, [CAT, TIN]), guarantees(model, edit.fold(model), [CAT, TIN])
    assert [line.name for line in maps.retained] == ["", "bird", "grandmother", "iron", "soup"]
    assert [(line.name, line.anchor) for line in maps.erased] == [("cat", "apple tree"), ("tin", "")]
    for one, other in zip(maps.retained + maps.erased, folded.retained + folded.erased, strict=True):
        assert one.after.last == pytest.approx(other.after.last, abs=1e-6)
        assert other.after.text == other.before.text  # no weight changes the rows
    assert all(line.after.text != line.before.text for line in maps.erased)


def test_the_text_side_is_the_maps_own_algebra():
    model = tiny_pipeline("sd1")
    edit = UCE().erase(model, CAT)
    (shared,), found = edit.maps["text"], guarantees(model, edit, CAT)

    def row(name):
        last = model.subject_end(name, name) if name else int(model.encode([name]).end[0])
        return model.encode([name]).states[0, last].double()

    for line in found.retained:
        r = row(line.name)
        # rows in float32, encoded in another batch: 1e-6
        assert line.after.text == pytest.approx(float((shared(r) - r).norm() / r.norm()), abs=1e-5)
    goal = row("apple tree")
    (line,) = found.erased
    assert line.before.text == pytest.approx(float((row("cat") - goal).norm() / goal.norm()), abs=1e-5)
    assert line.after.text == pytest.approx(float((shared(row("cat")) - goal).norm() / goal.norm()), abs=1e-5)


def test_an_edit_inside_the_text_encoder_is_encoded_with():
    model = tiny_pipeline("sd1")
    inside = ConceptMap(normal(32, 2, size=0.3), normal(2, 32, seed=1, size=0.3), normal(32, seed=2))
    weight = next(n for n, _ in model.module.named_parameters() if n.endswith("layers.0.mlp.fc1.weight"))
    for edit in (
        Edit(model.text_fingerprint, maps={"text_encoder.layers.0": (inside,), "text": (inside,)}),
        Edit(model.fingerprint, deltas={weight: Dense(normal(*model.parameter_shape(weight)))}),
    ):
        found = assert_told(model, edit)
        assert not found.uncovered and found.max > 1e-2 and found.retained[1].after.text > 1e-2


def test_what_else_an_edit_changes_is_named():
    model = tiny_pipeline("sdxl")
    width = model.width("pooled")
    pooled = ConceptMap(normal(width, 1), normal(1, width), normal(width))
    edit = Edit(model.fingerprint, maps={"pooled": (pooled,)}, generation={"negative_prompt": "cat"})
    found = guarantees(model, edit, CAT)
    assert found.max == 0 and found.uncovered == (
        "maps at pooled",
        "what is added when images are drawn (negative_prompt)",
    )
    trained = ESD(steps=1, batch_size=1, sampling_steps=2, variant="u").erase(model, CAT)
    (sentence,) = guarantees(model, trained, CAT).uncovered
    assert sentence.startswith(f"changes of {len(trained.deltas)} other weights of the denoiser (unet.")


def test_the_table_names_the_erased_the_mean_and_the_worst():
    from rich.console import Console

    model = tiny_pipeline("sd1")
    found = guarantees(model, UCE().erase(model, CAT), CAT)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(found.table(most=2))
    lines = [" ".join(line.split()) for line in capture.get().splitlines() if "." in line]
    (erased,) = found.erased
    shown = zip(vars(erased.before).values(), vars(erased.after).values(), strict=True)
    assert lines[0] == " ".join(["cat to apple tree", *(f"{before:.3f} → {after:.3f}" for before, after in shown)])
    worst = sorted(found.retained, key=lambda line: -line.after.last)[:2]
    assert [line.partition(" 0.")[0] for line in lines[2:]] == [line.name or "the empty prompt" for line in worst]
    assert f" {found.max:.3f} " in lines[2] and lines[1].startswith(f"retained, mean of 4 {found.mean:.3f} ")


def test_what_cannot_be_said_is_refused():
    model = tiny_pipeline("sd1")
    edit = UCE().erase(model, CAT)
    with edit.applied(model), pytest.raises(ValueError, match="An edit is in force"):
        guarantees(model, edit, CAT)
    with pytest.raises(ValueError, match="made for another model"):
        guarantees(tiny_pipeline("sd1", seed=1), edit, CAT)
    with pytest.raises(ValueError, match="No concept was given"):
        guarantees(model, edit, [])
    with pytest.raises(ValueError, match="tokens"):
        guarantees(model, edit, Concept(" ".join(METALS)))
