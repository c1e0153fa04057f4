"""What plain peft, plain transformers and plain diffusers load does what the edited model does."""

import pytest
import torch
from hosts import ALL, GARDEN, PIPELINES, T5_TOKENS, logits, same, state, tiny, tiny_pipeline
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conceptx.edit import Dense, Edit, LowRank, Rows
from conceptx.geometry import Subspace
from conceptx.store import load_tensors

# One rounding of each float32 weight and another order of sums, through three blocks: 1e-5 to 4e-5 is seen on logits
# of size 5 that the edits move by 4 to 10.
ROUNDING = {"rtol": 0, "atol": 2e-4}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_at(model, *endings, mean=True):
    """Removal maps at all sites with these endings."""
    found = {}
    for seed, site in enumerate(name for name in model.sites if name.endswith(endings)):
        d = model.width(site)
        found[site] = (
            Subspace.orthogonal(normal(d, 2, seed=seed), normal(d, seed=seed + 50) if mean else None).removal(),
        )
    return Edit(model.fingerprint, maps=found)


def everywhere(model, mean=True):
    return maps_at(model, "attention_input", "attention_heads", "mlp_input", "mlp_hidden", mean=mean)


def edited(model, edit):
    with edit.applied(model):
        return logits(model)


def suffixes(folder):
    return {path.suffix for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ALL)
def test_plain_peft_loads_the_same_model(kind, tmp_path):
    model = tiny(kind)
    edit = everywhere(model, mean=False).fold(model)
    edit.export_peft(tmp_path / "lora", model)
    plain = PeftModel.from_pretrained(tiny(kind).module, tmp_path / "lora")
    torch.testing.assert_close(logits(plain), edited(model, edit), **ROUNDING)
    assert suffixes(tmp_path) <= {".json", ".safetensors", ".md"}


def test_pairs_of_different_rank_and_rows_share_one_adapter(tmp_path):
    model = tiny()
    deltas = {
        "model.layers.0.mlp.up_proj.weight": LowRank(normal(48, 1), normal(1, 32)),
        "model.layers.2.self_attn.o_proj.weight": LowRank(normal(32, 3), normal(3, 32)),
        "lm_head.weight": Rows(torch.tensor([9, 4]), normal(2, 32)),
    }
    edit = Edit(model.fingerprint, deltas=deltas)
    edit.export_peft(tmp_path, model)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny().module, tmp_path)), edited(model, edit), **ROUNDING
    )


@pytest.mark.parametrize(
    "kind,edit_of,message",
    [
        ("llama", everywhere, "activation maps at .* fold it first"),
        ("llama", lambda m: everywhere(m).fold(m), "bias is no low-rank change"),
        ("llama", lambda m: Edit(m.fingerprint, deltas={"lm_head.weight": Dense(normal(320, 32))}), "no low-rank"),
        # peft's adapter of an embedding is another one, and of a tied head would leave the embedding as it is
        (
            "llama",
            lambda m: Edit(m.fingerprint, deltas={"model.embed_tokens.weight": Rows(torch.tensor([3]), normal(1, 32))}),
            "embed_tokens.weight is no low-rank change of an untied linear layer",
        ),
        (
            "llama_tied",
            lambda m: Edit(m.fingerprint, deltas={"lm_head.weight": LowRank(normal(320, 1), normal(1, 32))}),
            "lm_head.weight is no low-rank change of an untied linear layer",
        ),
        ("llama", lambda m: Edit(m.fingerprint), "changes no weight"),
        ("llama", lambda m: Edit(tiny("gpt2").fingerprint), "another model"),
    ],
)
def test_what_peft_cannot_hold_is_refused_and_the_old_folder_stays(kind, edit_of, message, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "old").write_text("old")
    model = tiny(kind)
    with pytest.raises(ValueError, match=message):
        edit_of(model).export_peft(tmp_path / "lora", model)
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "old"]


@pytest.mark.parametrize("kind", ALL)
def test_plain_transformers_loads_the_merged_model(kind, tmp_path):
    model = tiny(kind)
    before, edit = state(model), everywhere(model, mean=False)
    model.save_pretrained(tmp_path / "merged", edit)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), edited(model, edit), **ROUNDING)
    assert same(before, state(model))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged")(GARDEN[0]).input_ids == model.tokenizer(GARDEN[0]).input_ids
    )
    assert suffixes(tmp_path) <= {".json", ".safetensors", ".jinja"}


# The bias that a mean leaves fits where the layer has one (gpt2, gpt_neox, the qkv of qwen2), or where the
# configuration can switch one on.
HAS_ROOM = {
    ("attention_input", "attention_heads"): {"gemma", "gemma2", "gemma3_text", "qwen3"},
    ("attention_input",): {"qwen2"},
    ("attention_input", "attention_heads", "mlp_input", "mlp_hidden"): {
        "gpt2", "gpt_neox", "llama", "llama_tied", "smollm3",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("endings", HAS_ROOM, ids=len)
def test_a_merged_model_has_the_new_biases_or_is_refused(kind, endings, tmp_path):
    model = tiny(kind)
    switches = [getattr(model.module.config, name, None) for name in ("attention_bias", "mlp_bias")]
    before, edit = state(model), maps_at(model, *endings)
    room = any(kind in kinds and set(endings) <= set(places) for places, kinds in HAS_ROOM.items())
    if room:
        model.save_pretrained(tmp_path / "merged", edit)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(plain), edited(model, edit), **ROUNDING)
    else:
        with pytest.raises(ValueError, match=r"no place for the bias .*; erase with a zero mean"):
            model.save_pretrained(tmp_path / "merged", edit)
        assert not list(tmp_path.iterdir())
    assert same(before, state(model))
    assert switches == [getattr(model.module.config, name, None) for name in ("attention_bias", "mlp_bias")]


def test_a_bias_that_no_switch_governs_is_refused(tmp_path):
    model = tiny()
    edit = Edit(model.fingerprint, deltas={"lm_head.bias": Dense(normal(320))})
    with pytest.raises(ValueError, match=r"no place for the bias lm_head\.bias"):
        model.save_pretrained(tmp_path / "merged", edit)
    assert not list(tmp_path.iterdir())


def test_maps_that_cannot_be_folded_are_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="cannot be folded into weights"):
        model.save_pretrained(tmp_path / "merged", maps_at(model, "output"))
    assert not list(tmp_path.iterdir())


def test_bfloat16_merges_into_bfloat16(tmp_path):
    model = tiny("llama", torch.bfloat16)
    edit = everywhere(model).fold(model)
    model.save_pretrained(tmp_path / "merged", edit)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain), edited(model, edit))  # the same weights in the same dtype


# -- diffusers -----------------------------------------------------------------------------------------------------

PROMPTS = ["gold and iron", "a little bird"]


def images(pipeline):
    """What a plain pipeline draws, without the library."""
    pipeline.set_progress_bar_config(disable=True)
    length = {"max_sequence_length": T5_TOKENS} if hasattr(pipeline, "transformer") else {}
    random = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline(PROMPTS, num_inference_steps=3, generator=random, output_type="pt", **length).images


def drawn(model, edit):
    with edit.applied(model):
        return images(model.pipeline)


def linear_layers(model):
    """Weights of every linear layer of the denoiser, and of every one in a CLIP text encoder that diffusers reads."""
    names = [n for n, p in model.module.named_parameters() if p.ndim == 2 and n.endswith("weight")]
    clip = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return [
        n for n in names if model.takes_adapter(n) and (n.startswith(model.denoiser_name) or n.split(".")[-2] in clip)
    ]


def low_rank_everywhere(model):
    """Pairs of ranks 1, 2 and 3."""
    deltas = {}
    for seed, name in enumerate(linear_layers(model)):
        (out, inside), rank = model.parameter_shape(name), 1 + seed % 3
        deltas[name] = LowRank(normal(out, rank, seed=seed) / 20, normal(rank, inside, seed=seed + 500) / 2)
    return Edit(model.fingerprint, deltas=deltas)


@pytest.mark.parametrize("kind", PIPELINES)
def test_plain_diffusers_loads_the_lora_and_its_strength_is_ours(kind, tmp_path):
    model = tiny_pipeline(kind)
    edit, before = low_rank_everywhere(model), images(model.pipeline)
    edit.export_diffusers_lora(tmp_path / "no-gold.safetensors", model)
    plain = tiny_pipeline(kind).pipeline
    plain.load_lora_weights(str(tmp_path / "no-gold.safetensors"), adapter_name="no-gold")
    torch.testing.assert_close(images(plain), drawn(model, edit), **ROUNDING)
    for strength in (-1.0, 0.5, 2.0):
        plain.set_adapters(["no-gold"], adapter_weights=[strength])
        wanted = drawn(model, edit * strength)
        torch.testing.assert_close(images(plain), wanted, **ROUNDING)
        assert (wanted - before).abs().max() > 0.02
    plain.unload_lora_weights()
    assert torch.equal(images(plain), before)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_the_file_is_the_one_that_diffusers_itself_writes(kind, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    model = tiny_pipeline(kind)
    pipeline, paths = tiny_pipeline(kind).pipeline, [p.partition(".")[2] for p in model.projections]
    denoiser = getattr(pipeline, model.denoiser_name)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=paths, init_lora_weights=False))
    theirs = get_peft_model_state_dict(denoiser)
    pipeline.save_lora_weights(tmp_path / "theirs", **{f"{model.denoiser_name}_lora_layers": theirs})
    deltas = {
        f"{model.denoiser_name}.{path}.weight": LowRank(
            theirs[f"{path}.lora_B.weight"], theirs[f"{path}.lora_A.weight"]
        )
        for path in paths
    }
    Edit(model.fingerprint, deltas=deltas).export_diffusers_lora(tmp_path / "ours")
    ours, wanted = (load_tensors(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("ours", "theirs"))
    assert same(ours, wanted) and [path.name for path in (tmp_path / "ours").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]


@pytest.mark.parametrize("kind", PIPELINES)
def test_maps_are_exported_by_their_fold(kind, tmp_path):
    model = tiny_pipeline(kind)
    removal = Subspace.orthogonal(normal(model.width("text"), 2)).removal()
    edit = Edit(model.fingerprint, maps={"text": (removal,)})
    edit.fold(model).export_diffusers_lora(tmp_path, model)
    plain = tiny_pipeline(kind).pipeline
    plain.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(images(plain), drawn(model, edit), **ROUNDING)


def test_a_dense_change_is_cut_to_its_largest_part(tmp_path):
    model = tiny_pipeline("sd1")
    name, kept = f"{model.projections[0]}.weight", f"{model.projections[1]}.weight"
    change = normal(*model.parameter_shape(name))
    pair = LowRank(normal(16, 3), normal(3, 32))
    edit = Edit(model.fingerprint, deltas={name: Dense(change), kept: pair})
    edit.export_diffusers_lora(tmp_path / "cut.safetensors", model, rank=2)
    found = load_tensors(tmp_path / "cut.safetensors")
    for module, wanted in ((name, change), (kept, pair.up @ pair.down)):
        path = module.removesuffix("weight")
        up, down = found[f"{path}lora_B.weight"], found[f"{path}lora_A.weight"]
        assert down.shape == (3, 32)  # one rank for all
        left = wanted - (up @ down).double()
        if module == kept:
            assert left.abs().max() < 1e-5
        else:  # Eckart and Young: what is left is the rest of the singular values
            rest = torch.linalg.svdvals(change)[2:]
            torch.testing.assert_close(torch.linalg.svdvals(left)[: len(rest)], rest, rtol=1e-5, atol=1e-5)
    edit.export_diffusers_lora(tmp_path / "whole.safetensors", model, rank=99)  # more than there is: exact
    plain = tiny_pipeline("sd1").pipeline
    plain.load_lora_weights(str(tmp_path / "whole.safetensors"))
    torch.testing.assert_close(images(plain), drawn(model, edit), **ROUNDING)


def change_of(name, delta):
    return lambda model: Edit(model.fingerprint, deltas={name: delta})


TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    "edit_of,rank,message",
    [
        (lambda m: Edit(m.fingerprint, maps={"text": (Subspace.orthogonal(normal(32, 1)).removal(),)}), 2, "fold it"),
        (change_of(f"{TO_K}.weight", Dense(normal(16, 32))), None, "no low-rank change.* export with rank=... to keep"),
        (change_of(f"{TO_K}.bias", Dense(normal(16))), 2, "to_k.bias is no low-rank change.*save the merged model"),
        (change_of("unet.conv_in.weight", Dense(normal(16, 4, 3, 3))), 2, "conv_in.weight is no low-rank change"),
        (change_of(f"{TO_K}.weight", LowRank(normal(16, 1), normal(1, 32))), 0, "rank must be at least 1"),
        (
            change_of("text_encoder.embeddings.token_embedding.weight", LowRank(normal(640, 1), normal(1, 32))),
            None,
            "token_embedding",
        ),
        (lambda m: Edit(m.fingerprint), None, "changes no weight"),
    ],
)
def test_what_a_diffusers_lora_cannot_hold_is_refused_and_the_old_file_stays(
    edit_of, rank, message, with_model, tmp_path
):
    (tmp_path / "lora.safetensors").write_text("old")
    model = tiny_pipeline("sd1")
    with pytest.raises(ValueError, match=message):
        edit_of(model).export_diffusers_lora(tmp_path / "lora.safetensors", model if with_model else None, rank=rank)
    assert (tmp_path / "lora.safetensors").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_layers_of_which_diffusers_reads_no_lora_are_refused(tmp_path):
    flux = tiny_pipeline("flux")
    name = next(n for n in dict(flux.module.named_parameters()) if n.startswith("text_encoder_2") and "wi" in n)
    out, inside = flux.parameter_shape(name)
    edit = Edit(flux.fingerprint, deltas={name: LowRank(normal(out, 1), normal(1, inside))})
    with pytest.raises(
        ValueError, match=r"diffusers reads no LoRA layer at text_encoder_2.*; it reads those of unet, "
    ):
        edit.export_diffusers_lora(tmp_path, flux)
    llama = tiny()
    edit = Edit(llama.fingerprint, deltas={"lm_head.weight": LowRank(normal(320, 1), normal(1, 32))})
    with pytest.raises(ValueError, match="reads no LoRA layer at lm_head"):
        edit.export_diffusers_lora(tmp_path, llama)
    assert not list(tmp_path.iterdir())
