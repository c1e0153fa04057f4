"""ELM: its targets by hand, what it leaves alone, and runs that stop and go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hosts import GARDEN, METALS, logits, same, state, tiny

from conceptx import Concept, Edit, Personas, wrap
from conceptx.geometry import steer
from conceptx.methods import ELM, elm
from conceptx.train.targets import cross_entropy

PERSONAS = Personas(expert=("an expert on metals", "a smith"), novice=("a child", "a cook of soup"))
CONCEPT = Concept("metals", texts=METALS, retain_texts=GARDEN, personas=PERSONAS)
QUICK = ELM(
    layers=(0, 2), rank=2, eta=5.0, steps=3, batch_size=2, learning_rate=1e-2,
    max_tokens=16, fluency_texts=3, fluency_tokens=5,
)  # fmt: skip
ROUNDING = {"rtol": 0, "atol": 1e-4}  # float32 sums in another shape of batch; with eta = 5 and logits of size 5

quiet = pytest.mark.filterwarnings("ignore:The personas do not tell")  # a random model follows no persona


def change(settings=QUICK, **fields):
    return dataclasses.replace(settings, **fields)


def teacher_of(model, settings, personas=PERSONAS, seed=0):
    return elm.Teacher(settings, model, personas, seed, Accelerator(cpu=True))


def dense(targets, row):
    """The distributions of a row as (tokens, vocabulary)."""
    n = int(targets.length[row])
    return torch.zeros(n, 320).scatter(1, targets.indices[row, :n], targets.probabilities[row, :n])


@torch.no_grad()
def log_p(model, row, prefix=(), temperature=1.2):
    found = model.module(input_ids=torch.tensor([[*prefix, *row]])).logits[0, len(prefix) :]
    return (found / temperature).log_softmax(-1)


def same_edits(first, second):
    """Bit for bit the same weight changes."""
    one, two = ({f"{n}:{p}": t for n, d in e.deltas.items() for p, t in d.tensors().items()} for e in (first, second))
    return same(one, two)


# -- targets -------------------------------------------------------------------------------------------------------


def test_two_tokens_by_hand():
    """p (p_novice / p_expert)^eta, normalised: with 0.5, 0.25 / 0.5 and eta = 2 that is 0.1."""
    p, expert, novice = (torch.tensor([a, 1 - a]).log() for a in (0.5, 0.5, 0.25))
    target = steer(p, expert, [novice], [2.0]).softmax(0)
    odds = (0.25 / 0.5) ** 2 / (0.75 / 0.5) ** 2
    torch.testing.assert_close(target, torch.tensor([odds / (1 + odds), 1 / (1 + odds)]), rtol=1e-6, atol=0)
    shifted = steer(p + 3, expert - 1, [novice + 2], [2.0]).softmax(0)
    torch.testing.assert_close(shifted, target, rtol=1e-6, atol=0)  # constants cancel, to a float32 rounding


def test_without_guidance_the_target_is_the_model_at_the_temperature():
    model = tiny()
    rows = model.encode(METALS, max_length=16)
    targets = teacher_of(model, change(eta=0.0, ramp=False, top_k=None)).erased(rows)
    for number, row in enumerate(rows):
        torch.testing.assert_close(dense(targets, number), log_p(model, row).exp(), **ROUNDING)


@pytest.mark.parametrize("eta", [1.0, 500.0])
def test_equal_personas_leave_the_model_for_every_strength(eta):
    model = tiny()
    rows = model.encode(METALS, max_length=16)
    alike = Personas(expert=("somebody",), novice=("somebody",))
    targets = teacher_of(model, change(eta=eta, top_k=None), alike).erased(rows)
    for number, row in enumerate(rows):
        torch.testing.assert_close(dense(targets, number), log_p(model, row).exp(), **ROUNDING)


@pytest.mark.parametrize("ramp", [True, False])
def test_the_target_by_hand_in_every_row_with_its_ramp(ramp):
    """Equation 6 from plain forward passes over prefix + text: alignment, padding, ramp from 1 to eta, top 50."""
    model, eta = tiny(), 5.0
    one = Personas(expert=("an expert on metals",), novice=("a child",))
    expert, novice = (elm.encode_prefixes(model, prefixes)[0] for prefixes in (one.expert, one.novice))
    rows = model.encode([METALS[0], "tin is a metal", GARDEN[0]], max_length=16)
    targets = teacher_of(model, change(eta=eta, ramp=ramp), one).erased(rows)
    for number, row in enumerate(rows):
        strength = torch.linspace(1, eta, len(row))[:, None] if ramp else eta
        scores = log_p(model, row) + strength * (log_p(model, row, novice) - log_p(model, row, expert))
        values, indices = scores.topk(50)
        wanted = torch.zeros(len(row), 320).scatter(1, indices, values.softmax(-1))
        torch.testing.assert_close(dense(targets, number), wanted, **ROUNDING)
        assert int((dense(targets, number) > 0).sum(1).max()) == 50
    assert torch.equal(targets.rest, torch.zeros_like(targets.rest))
    assert torch.equal(targets.learn, targets.mask.float())


def test_the_empty_prefix_is_no_prefix():
    model = tiny()
    rows = model.encode(METALS[:3])
    assert torch.equal(model.predict(rows, prefix=()), model.predict(rows))


@pytest.mark.parametrize("top_k", [50, 5, None])
def test_soft_retain_loss_of_the_model_itself_is_its_entropy(top_k):
    """Of the distribution in which the tokens that are not kept are one."""
    model = tiny()
    rows = model.encode(GARDEN, max_length=16)
    targets = teacher_of(model, change(top_k=top_k)).retained(rows)
    with torch.no_grad():
        losses = cross_entropy(model.module(input_ids=targets.ids, attention_mask=targets.mask).logits, targets)
    for number, row in enumerate(rows):
        p = log_p(model, row, temperature=1.0).exp()
        kept = p.topk(top_k or 320).values
        grouped = torch.cat([kept, (1 - kept.sum(1, keepdim=True)).clamp(min=0)], 1)
        # float32: a rest of 1e-7 where all is kept, with a logarithm of at most log(1e-6)
        torch.testing.assert_close(losses[number], torch.special.entr(grouped).sum(1).mean(), rtol=0, atol=1e-4)


def test_hard_retain_targets_are_the_models_most_likely_tokens():
    model = tiny()
    rows = model.encode(GARDEN, max_length=16)
    targets = teacher_of(model, change(retain_targets="hard")).retained(rows)
    for number, row in enumerate(rows):
        assert torch.equal(targets.indices[number, : len(row), 0], log_p(model, row).argmax(-1))
    assert bool((targets.probabilities[targets.learn.bool()] == 1).all()) and not bool(targets.rest.any())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_fluency_is_learnt_from_the_first_new_token_of_texts_that_change_the_subject(kind):
    model = tiny()
    rows = model.encode(METALS[:3], max_length=16)
    targets = teacher_of(model, change(fluency_targets=kind)).fluent(rows)
    bridges = model.encode([" " + bridge for bridge in elm.BRIDGES])
    for number, row in enumerate(rows):
        n, learn = int(targets.length[number]), targets.learn[number]
        ids, first = targets.ids[number, :n].tolist(), int(learn.argmax())
        assert ids[: len(row)] == row and ids[len(row) : first + 1] in bridges
        assert int(learn.sum()) == QUICK.fluency_tokens == n - first
        drawn = ids[first + 1 :]
        learnt = targets.indices[number, first : n - 1]
        if kind == "hard":
            assert learnt[:, 0].tolist() == drawn
        else:  # every token that was drawn was one that its target allows
            assert all(token in allowed for token, allowed in zip(drawn, learnt.tolist(), strict=True))
            torch.testing.assert_close(targets.probabilities[number, first:n].sum(-1), torch.ones(n - first))


def test_without_guidance_and_with_one_token_fluency_is_greedy_text():
    model = tiny()
    rows = model.encode(METALS[:2], max_length=16)
    targets = teacher_of(model, change(fluency_guidance=0.0, fluency_targets="hard", top_k=1)).fluent(rows)
    for number in range(2):
        first = int(targets.learn[number].argmax())
        row = targets.ids[number, : first + 1].tolist()
        for _ in range(QUICK.fluency_tokens):
            scores = log_p(model, row)[-1]
            scores[model.tokenizer.eos_token_id] = -torch.inf
            row.append(int(scores.argmax()))
        assert targets.indices[number, first : first + QUICK.fluency_tokens, 0].tolist() == row[first + 1 :]


# -- personas ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught():
    """A tiny model that writes of metals after "a smith" and of the garden after "a child"."""
    model = tiny()
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    heads = elm.encode_prefixes(model, ["a smith", "a child"])
    rows = [
        [*head, *row]
        for heads_of, texts in (((heads[0], []), METALS), ((heads[1], []), GARDEN))
        for head in heads_of
        for row in model.encode(texts)
    ]
    ids, mask = model.pad(rows)
    for _ in range(80):
        model.module(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def fresh(model):
    import copy

    return wrap(copy.deepcopy(model.module), model.tokenizer)


SMITH = Concept(
    "metals", texts=METALS, retain_texts=GARDEN, personas=Personas(expert=("a smith",), novice=("a child",))
)


def test_personas_that_the_model_follows_raise_no_warning(taught):
    gap = elm.persona_gap(taught, SMITH)
    assert gap.visible and gap.forget < -1 < 1 < gap.retain
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        QUICK.erase(fresh(taught), SMITH)


@pytest.mark.parametrize("expert,novice", [("a smith", "a smith"), ("a child", "a smith")], ids=["equal", "reversed"])
def test_personas_that_do_not_tell_the_concept_are_warned_of(taught, expert, novice):
    concept = SMITH.model_copy(update={"personas": Personas(expert=(expert,), novice=(novice,))})
    with pytest.warns(UserWarning, match="personas do not tell 'metals' from other texts on this model"):
        QUICK.erase(fresh(taught), concept)


def test_the_concept_is_lost_and_the_rest_is_kept(taught):
    model = fresh(taught)

    def likelihood(texts):
        rows = model.encode(texts)
        return torch.cat(model.log_likelihoods(rows, [1] * len(rows))).mean()

    before = [likelihood(texts) for texts in (METALS, GARDEN)]
    edit = change(layers=(0, 3), rank=4, eta=10.0, steps=60, batch_size=6, dropout=0.0).erase(model, SMITH)
    with edit.applied(model):
        after = [likelihood(texts) for texts in (METALS, GARDEN)]
    lost, kept = (b - a for b, a in zip(before, after, strict=True))
    assert lost > 1 and kept < lost / 3  # nats a token


# -- the edit ------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_host_stays_and_the_seed_decides(kind, dtype):
    model = tiny(kind, dtype)
    before, said, modes = state(model), logits(model), [m.training for m in model.module.modules()]
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    one, again, other = (QUICK.erase(model, CONCEPT, seed=seed) for seed in (0, 0, 1))
    assert same(before, state(model)) and torch.equal(logits(model), said)
    assert modes == [m.training for m in model.module.modules()] and torch.equal(random_state, torch.get_rng_state())
    assert same_edits(one, again) and not same_edits(one, other)
    touched = {name.removesuffix(".weight") for name in one.deltas}
    readers = {
        r for name, site in model.sites.items() for r in site.readers if name.startswith(("layers.0", "layers.1"))
    }
    assert touched == readers and all(d.kind == "low_rank" and d.down.shape[0] == 2 for d in one.deltas.values())
    with one.applied(model):
        assert bool(logits(model).isfinite().all()) and not torch.equal(logits(model), said)


@quiet
@pytest.mark.parametrize(
    "fields",
    [
        {"retain_targets": "hard"},
        {"fluency_targets": "hard", "fluency_guidance": 3.0},
        {"erase_weight": 0.0},
        {"retain_weight": 0.0, "fluency_weight": 0.0},
        {"top_k": None, "ramp": False},
        {"batch_size": 9},  # more than there are texts
        {"eta": 500.0},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_every_variant_runs_and_differs(fields):
    model = tiny()
    edit = change(**fields).erase(model, CONCEPT)
    assert all(bool(t.isfinite().all()) for d in edit.deltas.values() for t in d.tensors().values())
    assert not same_edits(edit, QUICK.erase(model, CONCEPT))
    assert edit.provenance[0]["settings"] == dataclasses.asdict(change(**fields))


@quiet
def test_a_run_that_stops_in_training_goes_on_to_the_same_edit(tmp_path, monkeypatch):
    settings, calls, loss = change(steps=60, fluency_tokens=3), [], elm.ELM._loss

    def stops(*arguments):
        calls.append(1)
        if len(calls) > 55 * 3:
            raise InterruptedError
        return loss(*arguments)

    model = tiny()
    before = state(model)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(elm.ELM, "_loss", stops)
        settings.erase(model, CONCEPT, checkpoint=tmp_path)
    assert same(before, state(model)) and {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}

    def none(*_):
        raise AssertionError("the teachers were there already")

    with monkeypatch.context() as patch:
        patch.setattr(elm.ELM, "_compute_teachers", none)
        patch.setattr(elm.ELM, "_loss", lambda *rest: calls.append(2) or loss(*rest))
        resumed = settings.erase(model, CONCEPT, checkpoint=tmp_path)
    assert calls.count(2) == 10 * 3  # from step 50
    assert same_edits(resumed, settings.erase(model, CONCEPT))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        settings.erase(model, CONCEPT, seed=1, checkpoint=tmp_path)


@quiet
def test_a_run_that_stops_among_the_teachers_goes_on_to_the_same_edit(tmp_path, monkeypatch):
    model = tiny()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(elm.Teacher, "fluent", lambda *_: (_ for _ in ()).throw(InterruptedError()))
        QUICK.erase(model, CONCEPT, checkpoint=tmp_path)
    assert same_edits(QUICK.erase(model, CONCEPT, checkpoint=tmp_path), QUICK.erase(model, CONCEPT))


def test_settings_survive_json():
    for settings in (ELM(), change(top_k=None, fluency_guidance=3.0, retain_targets="hard")):
        assert ELM.from_settings(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize(
    "concept,fields,message",
    [
        (Concept("metals", retain_texts=GARDEN), {}, "needs the concept's texts; 'metals' has none"),
        (Concept("metals", texts=METALS), {}, "needs the concept's retain_texts; 'metals' has none"),
        (CONCEPT, {"layers": (2, 4)}, "2..3 are not a range inside the model's 3 layers"),
        (CONCEPT, {"layers": (1, 1)}, "not a range inside"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_done(concept, fields, message):
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        change(**fields).erase(model, concept)
    assert same(before, state(model))


def test_an_edit_in_force_is_refused():
    model = tiny()
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="edit is in force"):
        QUICK.erase(model, CONCEPT)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"rank": 0, "steps": -1}, "rank, steps must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"top_k": 0}, "top_k must be positive or None, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        change(**fields)


# -- a run killed and a run on two processes -------------------------------------------------------------------------

RUN = Path(__file__).with_name("elm_run.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(out, steps, dropout, *launcher):
    command = [sys.executable, *launcher, str(RUN), str(out), str(steps), str(dropout)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["teachers-*.safetensors", "training.safetensors"])
def test_killed_and_started_again_gives_the_same_edit(moment, tmp_path):
    finished(run(tmp_path / "whole", 160, 0.05))
    process = run(tmp_path / "killed", 160, 0.05)
    while not list((tmp_path / "killed" / "checkpoint").glob(moment)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "edit").exists()
    finished(run(tmp_path / "killed", 160, 0.05))
    assert same_edits(Edit.load(tmp_path / "killed" / "edit"), Edit.load(tmp_path / "whole" / "edit"))


@pytest.mark.slow
def test_two_processes_give_the_edit_of_one(tmp_path):
    """The same batches, half of each row by row on either process, gradients averaged.

    Not bit for bit: the halves are summed in another order (1e-7 of a gradient), and training amplifies that, to 4e-7
    of changes of size 0.2 after these 20 steps. (After 200 steps on this random model it is 3e-3 of 1.0.)
    `accelerate launch --cpu` starts several processes through MPI only, so torch's own launcher starts them here.
    """
    finished(run(tmp_path / "one", 20, 0.0))
    output = finished(run(tmp_path / "two", 20, 0.0, "-m", "torch.distributed.run", "--nproc_per_node", "2"))
    assert output.count("of 2 processes") == 2
    one, two = (Edit.load(tmp_path / name / "edit") for name in ("one", "two"))
    assert one.deltas.keys() == two.deltas.keys()
    assert max(float(delta.up.abs().max()) for delta in one.deltas.values()) > 0.1
    for name, delta in one.deltas.items():
        for part, tensor in delta.tensors().items():
            torch.testing.assert_close(two.deltas[name].tensors()[part], tensor, rtol=0, atol=5e-6)


# -- settings at their limits -----------------------------------------------------------------------------------------


@quiet
def test_top_k_above_the_vocabulary_is_refused_or_is_the_vocabulary():
    try:
        edit = change(top_k=5000).erase(tiny(), CONCEPT)
    except ValueError as error:
        assert "top_k" in str(error)
    else:
        assert same_edits(edit, change(top_k=None).erase(tiny(), CONCEPT))


@quiet
def test_both_precisions_in_one_process():
    QUICK.erase(tiny(), CONCEPT)
    change(precision="bf16").erase(tiny(), CONCEPT)


@pytest.mark.parametrize(
    "fields",
    [
        {"fluency_texts": 0},
        {"fluency_tokens": 0},
        {"eta": float("nan")},
        {"erase_weight": 0.0, "retain_weight": 0.0, "fluency_weight": 0.0},
        {"erase_weight": -1.0},
    ],
    ids=lambda fields: ",".join(fields),
)
@quiet
def test_settings_that_leave_nothing_to_learn_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        change(**fields).erase(tiny(), CONCEPT)


@quiet
def test_a_host_in_training_mode_has_the_same_teachers():
    model = tiny("gpt2")
    rows = model.encode(METALS[:3], max_length=16)
    still = teacher_of(model, QUICK).fluent(rows)
    model.module.train()
    assert torch.equal(teacher_of(model, QUICK).fluent(rows).ids, still.ids)
