"""Sites inside the text encoders of a pipeline: read, changed, and gated prompt by prompt."""

from dataclasses import replace

import pytest
import torch
from hosts import CLIP_TOKENS, GARDEN, METALS, PIPELINES, same, state, tiny, tiny_pipeline

from conceptx import Edit
from conceptx.dictionaries import recorded
from conceptx.dictionaries.states import lengths_of
from conceptx.geometry import ConceptMap, FeatureMap, SparseDictionary, Subspace
from conceptx.models.diffusion_sites import real_tokens

every = pytest.mark.parametrize("kind", PIPELINES)
SITE = "text_encoder.layers.0"
PROMPTS = ["gold", "", "the cat sleeps", METALS[0]]
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inside(model):
    return [name for name, site in model.sites.items() if site.side == "output"]


def noted(model, site, prompts=PROMPTS):
    """What transformers itself notes of a block, as the pipeline calls the encoder: (n, tokens, d), and the ids."""
    name, _, layer = site.partition(".layers.")
    encoder, calls = getattr(model.pipeline, name), []
    before = encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    model.encode(prompts)
    before.remove()
    with torch.no_grad():
        hidden = encoder(calls[-1], output_hidden_states=True).hidden_states
    return hidden[int(layer) + 1], calls[-1]


def dictionary(d, width=200):
    parts = normal(d, width), normal(width, d, seed=1), normal(width, seed=2), normal(d, seed=3)
    return SparseDictionary(*(part.float() for part in parts), activation="topk", k=8)


def feature_map(d):
    return FeatureMap(dictionary(d), torch.tensor([0, 3]), -1.0)


def hooked(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules())


# -- reading -----------------------------------------------------------------------------------------------------------


@every
def test_every_block_of_every_text_encoder_is_a_site(kind):
    model = tiny_pipeline(kind)
    encoders = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if hasattr(model.pipeline, name)]
    blocks = {name: 1 if T5.get(kind) == name else 2 for name in encoders}
    assert inside(model) == [f"{name}.layers.{n}" for name, count in blocks.items() for n in range(count)]
    assert list(model.sites)[: -sum(blocks.values())] in (["text"], ["text", "pooled"])
    assert not any(model.readers(site) for site in inside(model))


@every
def test_recorded_are_the_states_of_the_tokens_that_are_no_padding(kind):
    """Whatever the batches, and although the pipeline pads to the end where CLIP is padded no more than needed."""
    model = tiny_pipeline(kind)
    for site in [name for name in inside(model) if not name.startswith(T5.get(kind, "none"))]:
        wanted, ids = noted(model, site)
        name = site.partition(".")[0].replace("text_encoder", "tokenizer")
        tokenizer = getattr(model.pipeline, name)
        counts = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
        assert model.lengths(PROMPTS, site) == counts == real_tokens(ids, tokenizer.eos_token_id).sum(1).tolist()
        rows = torch.cat([states[:count] for states, count in zip(wanted, counts, strict=True)])
        found = torch.cat([batch[site] for batch in model.record(PROMPTS, [site], batch_size=3)])
        assert found.shape == (sum(counts), model.width(site)) and model.begins(site) == 1
        torch.testing.assert_close(found, rows, rtol=0, atol=1e-5)  # float32 in matrices of other sizes


@pytest.mark.parametrize("kind", T5)
def test_of_t5_the_padding_is_read_but_not_recorded(kind):
    """T5 is not causal: it is padded as the pipeline pads it."""
    model, site, seen = tiny_pipeline(kind), f"{T5[kind]}.layers.0", []
    _, ids = noted(model, site)
    counts = model.lengths(PROMPTS, site)
    assert ids.shape[1] > max(counts) and real_tokens(ids, 1).sum(1).tolist() == counts and model.begins(site) == 0
    block = model.module.get_submodule(model.sites[site].module)
    look = block.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    model.encode(PROMPTS)
    look.remove()
    (found,) = model.record(PROMPTS, [site])
    rows = torch.cat([states[:count] for states, count in zip(seen[0], counts, strict=True)])
    torch.testing.assert_close(found[site], rows, rtol=0, atol=1e-5)


def test_several_sites_are_read_in_one_pass_and_the_model_stays():
    model = tiny_pipeline("sdxl")
    model.encode(PROMPTS)
    before, sites, hooks = state(model), inside(model), hooked(model)
    (both,) = model.record(PROMPTS, sites)
    for site in sites:
        (alone,) = model.record(PROMPTS, [site])
        assert torch.equal(alone[site], both[site])
    assert same(before, state(model)) and hooked(model) == hooks


def test_a_dictionary_is_made_of_every_token_shorter_prompts_first():
    model, site, texts = tiny_pipeline("sd1"), "text_encoder.layers.1", [*METALS, *GARDEN, "tin"]
    found = recorded(model, texts, site)
    assert len(found) == sum(lengths_of(model, texts, site)) and lengths_of(model, ["tin"], site) == [3]
    (tin,) = model.record(["tin"], [site])
    torch.testing.assert_close(found[:3], tin[site], rtol=0, atol=1e-5)


def test_real_tokens_end_with_the_first_end_token():
    ids = torch.tensor([[5, 7, 9, 9, 9], [5, 9, 0, 0, 0], [5, 7, 7, 7, 7], [9, 9, 9, 9, 9]])
    assert real_tokens(ids, 9).sum(1).tolist() == [3, 2, 5, 1]


# -- changing ----------------------------------------------------------------------------------------------------------


@every
def test_a_map_inside_changes_what_the_denoiser_reads_and_goes_without_a_trace(kind):
    model = tiny_pipeline(kind)
    for site in inside(model):
        plain = model.encode(PROMPTS)
        maps = {site: (Subspace.orthogonal(normal(model.width(site), 2), normal(model.width(site))).removal(),)}
        edit = Edit(model.text_fingerprint, maps=maps)
        with edit.applied(model):
            changed = model.encode(PROMPTS)
        again = model.encode(PROMPTS)
        assert torch.equal(plain.states, again.states)
        moved = (changed.states - plain.states).abs().max()
        if kind == "flux" and site.startswith("text_encoder."):  # gives the pooled vector alone
            moved = (changed.pooled - plain.pooled).abs().max()
        if kind in ("sdxl", "sd3") and site.endswith(".1"):  # the text is read before the last block
            assert moved == 0
        else:
            assert moved > 1e-3
        assert edit.fold(model).maps.keys() == {site}  # no linear layer reads it


def test_maps_at_one_site_act_in_order_and_before_transformers_notes_them():
    """SDXL reads a state that a hook of transformers notes, which may have been there first."""
    model, site = tiny_pipeline("sdxl"), "text_encoder.layers.0"
    d = model.width(site)
    first, second = (ConceptMap(normal(d, 1, seed=s), normal(1, d, seed=s + 1), normal(d)) for s in (1, 5))
    plain = model.encode(PROMPTS[:1]).states[..., :d]
    with Edit(model.text_fingerprint, maps={site: (first, second)}).applied(model):
        both = model.encode(PROMPTS[:1]).states[..., :d]
    torch.testing.assert_close(both, second(first(plain)), rtol=0, atol=1e-4)  # two casts to float32 of numbers near 50
    assert (both - first(second(plain))).abs().max() > 1
    with (
        Edit(model.text_fingerprint, maps={site: (first,)}).applied(model),
        Edit(model.text_fingerprint, maps={site: (second,)}).applied(model),
    ):
        assert torch.equal(both, model.encode(PROMPTS[:1]).states[..., :d])


# -- gated prompt by prompt --------------------------------------------------------------------------------------------


def gated(model, opened, margin=0.5):
    """An edit whose gate opens for these of PROMPTS, by features that no other has, and for nothing else."""
    (found,) = model.record(PROMPTS, [SITE])
    states = dict(zip(PROMPTS, found[SITE].split(model.lengths(PROMPTS, SITE)), strict=True))
    read = dictionary(model.width(SITE))
    active = {prompt: (read.encode(x[1:]) > 0).any(0) for prompt, x in states.items()}
    own = [torch.stack([active[p] for p in PROMPTS if (p in opened) == inside]).any(0) for inside in (True, False)]
    always = FeatureMap(read, (own[0] & ~own[1]).nonzero()[:, 0], -1.0, keep_error=True)
    least = min(float(always.score(states[prompt][None])) for prompt in opened)
    return Edit(model.text_fingerprint, maps={SITE: (replace(always, threshold=margin * least),)})


@every
def test_only_the_prompts_that_reach_the_threshold_change(kind):
    """All others stay bit for bit, also beside changed ones."""
    model, opened = tiny_pipeline(kind), ("gold", METALS[0])
    edit, plain = gated(model, opened), model.encode(PROMPTS)
    with edit.applied(model):
        changed = model.encode(PROMPTS)
    part = "pooled" if kind == "flux" else "states"
    for number, prompt in enumerate(PROMPTS):
        before, after = getattr(plain, part)[number], getattr(changed, part)[number]
        assert torch.equal(before, after) == (prompt not in opened)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_gate_does_not_see_padding_nor_neighbours(kind):
    """The same prompt alone, beside others, and with less padding than the pipeline puts behind it."""
    model, opened = tiny_pipeline(kind), ["gold"]
    edit = gated(model, opened, margin=1 - 1e-4)
    closed = [prompt for prompt in PROMPTS if prompt not in opened]
    plain = model.encode(opened).states[0]
    with edit.applied(model):
        alone = model.encode(opened).states[0]
        beside = model.encode([*closed, *opened]).states[-1]
        short = model.encode(opened, trimmed=True).states[0]
        shut = model.encode([closed[0], *opened], trimmed=True)
    assert (alone - plain).abs().max() > 0.01 and alone.shape[0] == CLIP_TOKENS
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(short, alone[: len(short)], rtol=0, atol=1e-4)
    torch.testing.assert_close(shut.states[1, : len(short)], short, rtol=0, atol=1e-4)
    assert torch.equal(shut.states[0], model.encode([closed[0], *opened], trimmed=True).states[0])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_it_acts_in_the_plain_call_of_the_pipeline(kind):
    model = tiny_pipeline(kind)
    edit = gated(model, [METALS[0]])

    def drawn(prompt):
        options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0, "height": 16, "width": 16}
        return model.pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images

    before = [drawn(prompt) for prompt in (METALS[0], "the cat sleeps")]
    with edit.applied(model):
        after = [drawn(prompt) for prompt in (METALS[0], "the cat sleeps")]
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert torch.equal(before[0], drawn(METALS[0]))


def test_saved_and_loaded_it_is_the_same_map(tmp_path):
    model, edit = tiny_pipeline("sd1"), gated(tiny_pipeline("sd1"), ["gold"])
    plain = ConceptMap(normal(32, 1, seed=1), normal(1, 32, seed=2), normal(32), "relu")
    edit = replace(edit, maps={SITE: (*edit.maps[SITE], plain, *edit.maps[SITE])})
    edit.save(tmp_path)
    loaded = Edit.load(tmp_path)
    assert [type(m) for m in loaded.maps[SITE]] == [FeatureMap, ConceptMap, FeatureMap]
    for one, other in zip(edit.maps[SITE], loaded.maps[SITE], strict=True):
        assert same(one.tensors(), other.tensors())
    with edit.applied(model):
        wanted = model.encode(PROMPTS).states
    with loaded.applied(model):
        assert torch.equal(model.encode(PROMPTS).states, wanted)
    plain_states = model.encode(PROMPTS).states
    with (0.0 * loaded).applied(model):
        assert torch.equal(model.encode(PROMPTS).states, plain_states)


def test_two_edits_at_one_site_have_an_order_that_matters():
    model, edit = tiny_pipeline("sd1"), gated(tiny_pipeline("sd1"), ["gold"])
    plain = Edit(model.text_fingerprint, maps={SITE: (Subspace.orthogonal(normal(32, 1)).removal(),)})
    for first, second in ((edit, plain), (plain, edit), (edit, edit)):
        with pytest.warns(UserWarning, match=f"order of the stacked edits matters at site {SITE}"):
            assert len((first + second).maps[SITE]) == 2


WHOLE = {
    "The site text is not inside a text encoder; these are: text_encoder.layers.0, text": lambda m: list(
        m.record(["gold"], ["text"])
    ),
    "The site text is not inside": lambda m: m.lengths(["gold"], "text"),
    "The site text": lambda m: Edit(m.fingerprint, maps={"text": (feature_map(32),)}).apply(m),
    "No text was given": lambda m: list(m.record([], [SITE])),
    "has 42 tokens": lambda m: list(m.record(["gold " * 40], [SITE])),
    "acts on dimension 8, the site has 32": lambda m: Edit(m.fingerprint, maps={SITE: (feature_map(8),)}).apply(m),
    "cannot be folded into weights": lambda m: m.save_pretrained(
        "nowhere", Edit(m.fingerprint, maps={SITE: (feature_map(32),)})
    ),
}


@pytest.mark.parametrize("message", WHOLE)
def test_what_makes_no_sense_is_refused_and_nothing_is_changed(message):
    model = tiny_pipeline("sd1")
    before = model.encode(PROMPTS).states
    with pytest.raises(ValueError, match=message) as caught:
        WHOLE[message](model)
    assert str(caught.value).endswith(".") and not model.applied
    assert torch.equal(model.encode(PROMPTS).states, before)


def test_a_language_model_takes_no_map_of_whole_prompts():
    model = tiny()
    with pytest.raises(ValueError, match="acts inside the text encoders of a pipeline, not in this model"):
        Edit(model.fingerprint, maps={"layers.1.output": (feature_map(32),)}).apply(model)
    assert not model.applied
