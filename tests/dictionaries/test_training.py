"""Training on the activations of a tiny model: the same run however often it is stopped, and it learns."""

import sys
from dataclasses import asdict, replace

import pytest
import torch
from hosts import GARDEN, METALS, same, state, tiny, tiny_pipeline

from conceptx.dictionaries import SAETraining, load_dictionary, recorded, saved_metadata, train_dictionary, training
from conceptx.dictionaries.states import lengths_of
from conceptx.geometry import reconstruction
from conceptx.progress import heard_by

SITE = "layers.1.mlp_output"
WORDS = [word for text in [*METALS, *GARDEN] for word in text.split()]
TEXTS = [f"{text} {word}" for text in [*METALS, *GARDEN] for word in WORDS[::9]]
SMALL = SAETraining(width=48, k=4, steps=60, batch_size=128, learning_rate=3e-3, dead_after=20)
JUMP = replace(SMALL, architecture="jumprelu")


def weights(trained):
    found = {name: getattr(trained.dictionary, name) for name in ("read", "write", "read_bias", "write_bias")}
    return found if trained.dictionary.threshold is None else found | {"threshold": trained.dictionary.threshold}


def train(settings=SMALL, texts=TEXTS, **options):
    return train_dictionary(tiny(), SITE, texts, settings, **options)


@pytest.fixture(scope="module", params=[SMALL, JUMP], ids=["topk", "jumprelu"])
def trained(request):
    return request.param, train(request.param)


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 17, 20, 59, 60])
def test_a_stopped_run_goes_on_to_the_same_dictionary(stop, trained, tmp_path, monkeypatch):
    """Also when the texts do not fit the buffer, so that the stop falls into the middle of a part."""
    settings, whole = trained
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 10)
    steps = []

    def halt(what, done, *_):
        if what == "training the dictionary":
            steps.append(done)
            if done == stop:
                raise InterruptedError

    with pytest.raises(InterruptedError), heard_by(halt):
        train(settings, folder=tmp_path)
    first = stop - 1 if stop % 10 == 0 else stop  # the report comes before the checkpoint
    steps.clear()
    with heard_by(lambda what, done, *_: steps.append(done) if what == "training the dictionary" else None):
        again = train(settings, folder=tmp_path)
    assert steps == list(range(first - first % 10 + 1, 61))
    assert same(weights(again), weights(whole)) and again.report == whole.report


@pytest.mark.parametrize("stop", [7, 33])
def test_a_run_in_parts_goes_on_to_the_same_dictionary(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 5)
    settings = replace(SMALL, buffer=400, steps=40)
    heard = []
    with heard_by(lambda what, done, *_: heard.append((what, done))):
        whole = train(settings)
    parts = len(training._parts(lengths_of(tiny(), TEXTS, SITE), settings.buffer))
    assert parts > 5 and heard.count(("recording activations", 0)) > 2 * parts  # every round reads them anew

    def halt(what, done, *_):
        if what == "training the dictionary" and done == stop:
            raise InterruptedError

    with pytest.raises(InterruptedError), heard_by(halt):
        train(settings, folder=tmp_path)
    assert same(weights(train(settings, folder=tmp_path)), weights(whole))


def test_a_finished_run_is_not_run_again(tmp_path):
    first, heard = train(folder=tmp_path), []
    with heard_by(lambda *report: heard.append(report[0])):
        assert same(weights(train(folder=tmp_path)), weights(first))
    assert "training the dictionary" not in heard


def test_the_seed_decides_and_the_users_random_state_is_left_alone(trained):
    settings, whole = trained
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():  # as a caller might
        again = train(settings)
    assert torch.equal(before, torch.get_rng_state())
    assert same(weights(again), weights(whole))
    assert not same(weights(train(settings, seed=1)), weights(whole))


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    short = replace(SMALL, steps=3)
    train(short, folder=tmp_path)
    for options in ({"seed": 1}, {"settings": replace(short, k=5)}, {"texts": TEXTS[1:]}):
        with pytest.raises(ValueError, match=r"training.safetensors is the checkpoint of another run; delete it"):
            train(**{"settings": short, "folder": tmp_path, **options})


def test_the_model_stays_and_nothing_is_printed(capsys):
    model = tiny()
    before = state(model)
    train_dictionary(model, SITE, TEXTS, replace(SMALL, steps=2))
    assert same(state(model), before) and not model.module.training
    assert capsys.readouterr() == ("", "")


# -- what is learnt ----------------------------------------------------------------------------------------------------


def test_it_learns(trained):
    """Held-out variance that it explains grows with the steps, and few features are active."""
    settings, whole = trained
    early = train(replace(settings, steps=2)).report
    assert whole.report.unexplained < 0.6 * early.unexplained
    assert whole.report.active <= (settings.k if settings is SMALL else 2 * settings.k)
    assert whole.dictionary.k == (settings.k if settings is SMALL else None)


def test_the_report_is_measured_on_held_out_texts(trained):
    settings, whole = trained
    learnt, measured = training._split(TEXTS, settings.held_out, 0)
    assert not set(learnt) & set(measured) and sorted(learnt + measured) == sorted(set(TEXTS))
    states = recorded(tiny(), measured, SITE)
    quality = reconstruction(whole.dictionary, states)
    report = whole.report
    assert (report.unexplained, report.active) == (quality.unexplained, quality.active)
    assert (report.tokens, report.held_out_tokens) == (sum(lengths_of(tiny(), learnt, SITE)), len(states))


def test_dead_are_the_features_that_have_not_fired_of_late():
    """At a vanishing learning rate the weights of the end are those of the last steps."""
    settings = replace(SMALL, k=1, steps=6, dead_after=3, learning_rate=1e-12)
    found = train(settings)
    stream = training._Stream(tiny(), SITE, training._split(TEXTS, settings.held_out, 0)[0], settings, 0)
    fired = torch.cat([found.dictionary.encode(stream.batch(step)) > 0 for step in (3, 4, 5)]).any(0)
    assert found.report.dead == int((~fired).sum()) > 0


def test_it_is_saved_with_its_report_and_sae_lens_reads_it(trained, tmp_path):
    import sae_lens

    settings, whole = trained
    whole.save(tmp_path)
    assert same(weights(replace(whole, dictionary=load_dictionary(tmp_path))), weights(whole))
    known = saved_metadata(tmp_path)
    assert known["site"] == SITE and known["report"] == asdict(whole.report) and known["settings"] == asdict(settings)
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    x = recorded(tiny(), TEXTS[:3], SITE)
    torch.testing.assert_close(sae(x), whole.dictionary.decode(whole.dictionary.encode(x)), rtol=1e-5, atol=1e-5)
    assert sae.cfg.metadata.hook_name == "model.layers.1.mlp.down_proj"


def test_the_scale_of_the_activations_does_not_matter():
    """A model that writes a thousandth gets the same directions, with outputs and biases of a thousandth."""
    small = tiny()
    with torch.no_grad():
        small.parameter("model.layers.1.mlp.down_proj.weight").mul_(2**-10)
    large, little = train(), train_dictionary(small, SITE, TEXTS, SMALL)
    for name, factor in {"read": 1, "write": 1, "read_bias": 2**10, "write_bias": 2**10}.items():
        expected = weights(large)[name]
        torch.testing.assert_close(weights(little)[name] * factor, expected, rtol=1e-3, atol=1e-3)
    assert little.report.unexplained == pytest.approx(large.report.unexplained, rel=1e-2)
    torch.testing.assert_close(large.dictionary.write.norm(dim=1), torch.ones(48), rtol=0, atol=1e-5)


# -- activations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [False, True])
def test_recorded_activations_leave_out_the_token_that_sees_only_itself(begins):
    """Where the tokenizer puts a token of its own before a text, all tokens of the text are there."""
    model = tiny("gemma2")
    if begins:
        model.start = [1]
    texts = [*METALS, *GARDEN, "tin", *TEXTS[:30]]
    found = recorded(model, texts, "layers.0.mlp_output")
    rows = []
    for text in sorted(texts, key=lambda text: len(model.encode([text])[0])):
        (alone,) = model.record([text], ["layers.0.mlp_output"])
        rows.append(alone["layers.0.mlp_output"][not begins :])
    torch.testing.assert_close(found, torch.cat(rows), rtol=0, atol=1e-4)
    assert len(found) == sum(lengths_of(model, texts, SITE))


@pytest.mark.parametrize("buffer,parts", [(100, 1), (5, 3), (4, 4)])
def test_texts_are_cut_into_parts_of_about_equal_length(buffer, parts):
    """Texts without an activation (a single token, which is left out) are in none."""
    lengths = [0, 3, 2, 0, 4, 1, 3, 0]
    found = training._parts(lengths, buffer)
    assert [i for part in found for i in part] == [1, 2, 4, 5, 6] and len(found) == parts
    assert all(sum(lengths[i] for i in part) < 13 / parts + 4 for part in found)
    assert training._parts([0, 0], buffer) == []


def test_recorded_activations_keep_the_dtype_of_the_model():
    assert recorded(tiny(dtype=torch.bfloat16), METALS, SITE).dtype == torch.bfloat16


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_it_is_trained_on_a_text_encoder_as_well(tmp_path):
    """The same run again, stopped or not; the folder says the site and what it was trained on."""
    model, site = tiny_pipeline("sdxl"), "text_encoder_2.layers.0"
    texts = [text for text in TEXTS if max(model.lengths([text], site)) <= 20]
    settings = replace(SMALL, steps=30, batch_size=64)
    before = state(model)
    whole = train_dictionary(model, site, texts, settings, folder=tmp_path / "checkpoint")
    assert same(before, state(model)) and whole.dictionary.dim == model.width(site) == 32
    assert same(weights(train_dictionary(tiny_pipeline("sdxl"), site, texts, settings)), weights(whole))
    early = train_dictionary(model, site, texts, replace(settings, steps=2)).report
    assert whole.report.unexplained < 0.8 * early.unexplained
    learnt, measured = training._split(texts, settings.held_out, 0)
    counted = [sum(len(model.pipeline.tokenizer_2(text).input_ids) for text in part) for part in (learnt, measured)]
    assert [whole.report.tokens, whole.report.held_out_tokens] == counted
    whole.save(tmp_path)
    known = saved_metadata(tmp_path)
    assert (known["site"], known["model_type"]) == (site, "clip_text_model")
    assert known["hook_name"].startswith("text_encoder_2.") and known["hook_name"].endswith("encoder.layers.0")


@pytest.mark.parametrize(
    "site,texts,kind,message",
    [
        ("text", TEXTS, ValueError, "The site text is not inside a text encoder; these are: text_encoder.layers.0"),
        ("text_encoder.layers.7", TEXTS, KeyError, r"no site 'text_encoder.layers.7'; similar: text_encoder"),
        ("text_encoder.layers.0", [*TEXTS, "tin " * 60], ValueError, "has 62 tokens with its special ones, the tok"),
    ],
)
def test_what_a_pipeline_cannot_record_is_refused(site, texts, kind, message):
    with pytest.raises(kind, match=message):
        train_dictionary(tiny_pipeline("sd1"), site, texts, SMALL)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,kind,message",
    [
        (lambda: train(texts=["one"] * 3), ValueError, "two different texts or more, got 1"),
        (lambda: train(texts=["a", "b"]), ValueError, "give 0 activations to train on"),
        (lambda: train(texts=METALS), ValueError, "activations to train on; a batch takes 128"),
        (lambda: train(texts=["a", " "]), ValueError, "1 of [12] texts are blank"),
        (lambda: train(texts=["a b", "tin " * 600]), ValueError, "tokens, the model reads at most 512; split it"),
        (lambda: train_dictionary(tiny(), "layers.9.output", TEXTS, SMALL), KeyError, "There is no site"),
        (lambda: train(replace(SMALL, learning_rate=1e30)), FloatingPointError, "not finite at step"),
        (lambda: replace(SMALL, architecture="gated"), ValueError, "Unknown architecture 'gated'; available: topk"),
        (lambda: replace(SMALL, k=49), ValueError, "k = 49 features cannot be active where there are 48"),
        (lambda: replace(SMALL, steps=0, dead_after=-1), ValueError, "steps, dead_after must be positive"),
        (lambda: replace(SMALL, buffer=100), ValueError, "A buffer of 100 activations holds no batch of 128"),
        (lambda: replace(SMALL, learning_rate=0.0), ValueError, "must be positive and finite"),
        (lambda: replace(SMALL, held_out=1.0), ValueError, "between 0 and 1, got 1.0"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make()
    assert str(caught.value).strip("'\"").endswith(".")


def test_a_model_with_an_edit_is_refused():
    model = tiny()
    model.applied.append("an edit")
    with pytest.raises(ValueError, match="An edit is in force"):
        train_dictionary(model, SITE, TEXTS, SMALL)


def test_without_sae_lens_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"pip install 'conceptx\[sae\]'"):
        train()
