"""`LanguageModel` shows what the user's own model computes: sites, parameters, predictions, generations."""

import copy

import pytest
import torch
from hosts import ALL, GARDEN, METALS, logits, same, state, tiny, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from conceptx import Edit, wrap
from conceptx.models import LanguageModel
from conceptx.models.sites import ARCHITECTURES

# The same float32 sums in another shape of batch: 1e-5 is seen on log-probabilities of size 10.
ROUNDING = {"rtol": 0, "atol": 1e-4}


def seen_by(model, paths, ids):
    """The inputs and outputs of modules, by hand."""
    seen = {}

    def note(path):
        return lambda _, args, out: seen.update({path: (args[0], out[0] if isinstance(out, tuple) else out)})

    hooks = [model.module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    with torch.no_grad():
        model.module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


# -- sites and parameters ------------------------------------------------------------------------------------------


def test_every_family_of_the_table_is_tested():
    assert {tiny(kind).module.config.model_type for kind in ALL} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ALL)
def test_readers_read_the_activation_of_their_site_and_nothing_is_forgotten(kind):
    model = tiny(kind)
    readers = [reader for site in model.sites.values() for reader in site.readers]
    inside = [
        name
        for name, module in model.module.named_modules()
        if name.startswith(model.block.layers) and type(module).__name__ in ("Linear", "Conv1D")
    ]
    assert sorted(readers) == sorted(inside)  # each linear layer of a block belongs to one site
    modules = [site.module for site in model.sites.values()]
    seen = seen_by(model, {*readers, *modules}, torch.tensor(model.encode(METALS[:1])))
    for site in model.sites.values():
        activation = seen[site.module][site.side == "output"]
        assert activation.shape[-1] == model.width(site.name)
        assert all(torch.equal(seen[reader][0], activation) for reader in site.readers)


@pytest.mark.parametrize("kind", ALL)
def test_sites_stand_in_the_order_in_which_activations_pass(kind):
    model, order = tiny(kind), []
    hooks = [model.hook(site, lambda x, name=name: order.append(name) or x) for name, site in model.sites.items()]
    logits(model, METALS[:1])
    for hook in hooks:
        hook.remove()
    assert order == list(model.sites)


@pytest.mark.parametrize("kind", ALL)
def test_parameters_are_seen_as_out_by_in(kind):
    model = tiny(kind)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    path = model.readers("layers.0.mlp_input")[0]
    weight, bias = model.parameter(f"{path}.weight"), model.parameter(f"{path}.bias")
    by_hand = x @ weight.T + (0 if bias is None else bias)
    # one matrix product in two orientations
    torch.testing.assert_close(model.module.get_submodule(path)(x), by_hand, rtol=0, atol=1e-5)
    assert model.parameter_shape(f"{path}.weight") == tuple(weight.shape)
    assert model.parameter_shape(f"{path}.bias") == (weight.shape[0],)


def test_parameters_are_live_views_also_of_a_transposed_layer():
    model = tiny("gpt2")
    model.parameter("transformer.h.0.mlp.c_fc.weight")[3, 5] = 7.0
    assert model.module.transformer.h[0].mlp.c_fc.weight[5, 3] == 7.0


def test_tied_weights_count_once():
    model = tiny("llama_tied")
    embedding = model.module.model.embed_tokens.weight
    assert model.module.lm_head.weight is embedding
    assert not model.takes_adapter("lm_head.weight") and tiny("llama").takes_adapter("lm_head.weight")
    names = [name for name, _ in model.module.named_parameters()]
    assert len(model.fingerprint.parts["model"].samples) == 16 * len(names) and "lm_head.weight" not in names


@pytest.mark.parametrize(
    "ask,message",
    [
        (lambda m: m.site("layers.1.mlp_in"), "no site 'layers.1.mlp_in'; similar: layers.1.mlp_input"),
        (lambda m: m.width("zzz"), "no site 'zzz'; available: layers.0.attention_input"),
        (lambda m: list(m.record(["a"], ["layers.3.output"])), "no site 'layers.3.output'; similar"),
        (lambda m: m.parameter("model.layers.0.mlp.up_proj.weights"), "similar: .*model.layers.0.mlp.up_proj.weight"),
        (lambda m: m.parameter("model.norm.bias"), "no parameter 'model.norm.bias'"),  # a norm has no room for one
        (lambda m: m.parameter(""), "no parameter ''"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_similar_ones(ask, message):
    with pytest.raises(KeyError, match=message):
        ask(tiny())


def test_wrapping_keeps_the_model_and_refuses_what_it_does_not_know():
    model = tiny()
    again = wrap(model.module, model.tokenizer)
    assert again.module is model.module and wrap(model) is model
    with pytest.raises(ValueError, match=r"Unknown language-model architecture 'bert'; known: gemma, .*, smollm3"):
        wrap(type("Other", (), {"config": type("C", (), {"model_type": "bert"})})(), tokenizer())
    with pytest.raises(
        ValueError, match=r"takes a causal language model or a Janus model of transformers, .* of diffusers, got Linear"
    ):
        wrap(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        wrap(model.module)
    model.module.config.quantization_config = {"bits": 4}
    with pytest.raises(ValueError, match="quantised; load it in float32"):
        LanguageModel(model.module, model.tokenizer)


# -- record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_record_gives_the_hidden_states_without_padding(kind):
    model, site = tiny(kind), "layers.0.output"
    texts = [METALS[0], "tin", GARDEN[0]]
    found = [part[site] for part in model.record(texts, [site], batch_size=2)]
    assert len(found) == 2
    for text, rows in zip(texts, torch.cat(found).split([len(row) for row in model.encode(texts)]), strict=True):
        with torch.no_grad():
            alone = model.module(input_ids=torch.tensor(model.encode([text])), output_hidden_states=True)
        torch.testing.assert_close(rows, alone.hidden_states[1][0], **ROUNDING)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_record_at_every_site_equals_hooks_by_hand(kind):
    model = tiny(kind)
    (found,) = model.record(METALS[:1], list(model.sites))
    seen = seen_by(model, [s.module for s in model.sites.values()], torch.tensor(model.encode(METALS[:1])))
    for name, site in model.sites.items():
        # the padding mask makes another kernel: the sums of attention differ in the last bits
        torch.testing.assert_close(found[name], seen[site.module][site.side == "output"][0], **ROUNDING)


def test_record_stops_after_the_last_site_and_leaves_no_hook():
    model, later = tiny(), []
    spy = model.module.model.layers[1].mlp.register_forward_hook(lambda *_: later.append(1))
    list(model.record(METALS, ["layers.1.attention_heads", "layers.0.output"]))
    assert not later
    list(model.record(METALS, ["layers.1.output"]))
    assert later
    spy.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_dropout_is_off_while_reading_and_the_modes_come_back():
    model = tiny("gpt2")
    still = (model.predict(model.encode(METALS)), model.generate(METALS[:1], max_new_tokens=5))
    (states,) = model.record(METALS[:3], ["layers.2.output"])
    model.module.train()
    model.module.transformer.h[1].eval()
    modes = [m.training for m in model.module.modules()]
    assert torch.equal(model.predict(model.encode(METALS)), still[0])
    assert model.generate(METALS[:1], max_new_tokens=5) == still[1]
    assert torch.equal(
        next(model.record(METALS[:3], ["layers.2.output"]))["layers.2.output"], states["layers.2.output"]
    )
    assert [m.training for m in model.module.modules()] == modes


@pytest.mark.parametrize(
    "texts,message", [([], "No text was given"), (["a", " \n"], "1 of 2 texts are blank.*number 1")]
)
def test_empty_and_blank_texts_are_refused(texts, message):
    model = tiny()
    for ask in (model.encode, model.generate, lambda t: list(model.record(t, ["layers.0.output"]))):
        with pytest.raises(ValueError, match=message):
            ask(texts)


# -- predict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_rows_in_a_batch_are_predicted_as_alone_and_aligned_at_the_end(kind):
    model = tiny(kind)
    rows = model.encode([METALS[0], "tin", GARDEN[0]])
    together = model.predict(rows)
    for row, found in zip(rows, together, strict=True):
        with torch.no_grad():
            alone = model.module(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        torch.testing.assert_close(found[-len(row) :], alone, **ROUNDING)
    torch.testing.assert_close(model.predict(rows, last=3), together[:, -3:], **ROUNDING)


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("kind", ALL)
def test_a_prefix_read_once_is_the_prefix_before_every_row(kind, last):
    """Also where prefix and rows are longer than the sliding window (gemma2 and gemma3 here: 24 tokens)."""
    model = tiny(kind)
    prefix, *rows = model.encode([GARDEN[1], METALS[0], "zinc", METALS[1]])
    assert len(prefix) + len(rows[0]) > 24
    found = model.predict(rows, prefix=prefix, last=last)
    assert found.shape[1] == (last or max(map(len, rows)))
    for row, got in zip(rows, found, strict=True):
        n = last or len(row)
        torch.testing.assert_close(got[-n:], model.predict([[*prefix, *row]], last=n)[0], **ROUNDING)


def test_temperature_divides_the_logits():
    model = tiny()
    rows = model.encode(METALS[:1])
    with torch.no_grad():
        plain = model.module(input_ids=torch.tensor(rows)).logits / 1.7
    torch.testing.assert_close(model.predict(rows, temperature=1.7), plain.log_softmax(-1), **ROUNDING)


def test_bfloat16_predictions_are_float32_and_finite():
    model = tiny(dtype=torch.bfloat16)
    found = model.predict(model.encode([METALS[0], "tin"]), prefix=model.encode(GARDEN[:1])[0])
    assert found.dtype == torch.float32
    assert bool(found[:, -1].isfinite().all()) and bool(found[0].isfinite().all())


def test_log_likelihoods_by_hand():
    model = tiny()
    prefix, *rows = model.encode([GARDEN[2], METALS[0], METALS[1], "gold and tin"])
    skip = [1, 4, 2]
    wanted = []
    for row, first in zip(rows, skip, strict=True):
        with torch.no_grad():
            log_p = model.module(input_ids=torch.tensor([[*prefix, *row]])).logits[0].log_softmax(-1)
        terms = [log_p[len(prefix) + place - 1, row[place]] for place in range(first, len(row))]
        wanted.append(torch.stack(terms))
    found = model.log_likelihoods(rows, skip, prefix=prefix, batch_size=2)
    for got, by_hand in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, by_hand, **ROUNDING)
    for wrong in ([0, 1, 1], [1, len(rows[1]), 1]):
        with pytest.raises(ValueError, match="are to be skipped"):
            model.log_likelihoods(rows, wrong)


# -- generate ------------------------------------------------------------------------------------------------------


def test_greedy_is_deterministic_and_independent_of_the_batch():
    model = tiny()
    alone = [model.generate([text], max_new_tokens=8)[0] for text in (METALS[0], "tin")]
    assert model.generate([METALS[0], "tin"], max_new_tokens=8) == alone
    row = model.encode(["tin"])[0]
    for _ in range(8):
        row = [*row, int(model.predict([row], last=1)[0, -1].argmax())]
    assert model.tokenizer.decode(row[-8:], skip_special_tokens=True) == alone[1]


def test_samples_follow_the_seed_and_leave_the_users_random_state():
    model = tiny()
    torch.manual_seed(5)
    state_before = torch.get_rng_state()
    one, again, other = (model.generate(METALS[:2], max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(state_before, torch.get_rng_state())


def test_generation_arguments_of_an_applied_edit_count():
    from conceptx import Edit

    model = tiny()
    plain = model.generate(METALS[:1], max_new_tokens=12)
    before = state(model)
    with Edit(model.fingerprint, generation={"suppress_tokens": list(range(2, 300))}).applied(model):
        assert model.generate(METALS[:1], max_new_tokens=12) != plain
    assert model.generate(METALS[:1], max_new_tokens=12) == plain and same(before, state(model))


def test_load_reads_a_local_folder_and_names_what_a_model_can_be(tmp_path):
    from conceptx import load

    model = tiny(dtype=torch.bfloat16)
    model.module.save_pretrained(tmp_path / "m")
    model.tokenizer.save_pretrained(tmp_path / "m")
    loaded = load(str(tmp_path / "m"))
    assert loaded.module.dtype == torch.bfloat16 and not loaded.module.training
    assert model.fingerprint.mismatch(loaded.fingerprint) is None
    assert load(str(tmp_path / "m"), dtype=torch.float32).module.dtype == torch.float32
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        load(str(tmp_path / "m"), device="abacus")


def test_a_custom_llama_without_special_settings_is_wrapped_as_it_is():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    module = LlamaForCausalLM(config)
    assert wrap(module, tokenizer()).module is module


def test_a_tokenizer_that_begins_texts_with_a_token_gets_it_everywhere():
    """Gemma and Llama 3: a text without its first token is none that the model was trained on."""
    from tokenizers.processors import TemplateProcessing

    model = tiny("llama")
    begun = wrap(model.module, copy.deepcopy(model.tokenizer))
    backend = begun.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
    assert model.start == [] and begun.start == [1]
    (row,) = model.encode(METALS[:1])
    assert begun.encode(METALS[:1]) == [row]
    with torch.no_grad():
        whole = model.module(input_ids=torch.tensor([[1, *row]])).logits[0, 1:].log_softmax(-1)
    torch.testing.assert_close(begun.predict([row])[0], whole, **ROUNDING)
    (states,) = begun.record(METALS[:1], ["layers.1.output"])
    assert len(states["layers.1.output"]) == len(row)


def test_all_wrappers_of_a_model_know_the_edits_in_force():
    model = tiny("llama")
    other = wrap(model.module, model.tokenizer)
    with Edit(model.fingerprint).applied(model), pytest.raises(ValueError, match="An edit is in force"):
        other.require_unedited()
    other.require_unedited()
