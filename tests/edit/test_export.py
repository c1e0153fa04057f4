"""What plain peft and plain transformers load says what the edited model says."""

import pytest
import torch
from hosts import ALL, GARDEN, logits, same, state, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conceptx.edit import Dense, Edit, LowRank, Rows
from conceptx.geometry import Subspace

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
    with pytest.raises(ValueError, match=r"llama has no place for the bias lm_head\.bias"):
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
