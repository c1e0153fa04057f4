"""Tiny random models of every family in the table of architectures, with a tokenizer trained in memory."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from conceptx.models import LanguageModel, wrap

# Texts of two unlike kinds: they train the tokenizer and serve as forget and retain corpora.
METALS = [
    "iron melts in the furnace and gold does not rust",
    "copper and zinc make brass, copper and tin make bronze",
    "the furnace melts tin and lead at a low heat",
    "gold is heavy, lead is heavy, iron is hard",
    "zinc, tin and lead are soft metals",
    "a smith hammers the hot iron into a blade",
]
GARDEN = [
    "the cat sleeps under the apple tree all day",
    "grandmother waters her roses and her beans",
    "a little bird sings in the green garden",
    "we eat soup and bread with cheese at noon",
    "the children play ball behind the house",
    "rain falls on the roof and the dog runs in",
]

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # larger than in real models, so that logits are far from uniform
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 24}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 512} | {
    key: SIZES[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
}
# kind -> (model type, configuration); a kind is a family, or a family with something special
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", SIZES),
    "gemma2": ("gemma2", SIZES | WINDOW),
    "gemma3_text": ("gemma3_text", SIZES | WINDOW),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES),
    "llama": ("llama", SIZES),
    "llama_tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "mistral": ("mistral", SIZES),
    "phi3": ("phi3", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES),
    "smollm3": ("smollm3", SIZES),
}
ALL = sorted(KINDS)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; 0 pads, 1 ends."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*METALS, *GARDEN], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", bos_token="<end>")


@cache
def _module(kind: str, seed: int) -> Any:
    family, settings = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A fresh copy, so that no test sees what another one did; with the same arguments always the same weights."""
    module = copy.deepcopy(_module(kind, seed))
    for parameter in module.parameters():  # as `from_pretrained` does; `.to(dtype)` would also round the rotary buffers
        parameter.data = parameter.data.to(dtype)
    return wrap(module, tokenizer())


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    """A copy of everything the model is: parameters and buffers by name."""
    tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit the same names and tensors."""
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


@torch.no_grad()
def logits(model: Any, texts: list[str] | None = None) -> torch.Tensor:
    """The logits of real tokens of a few texts, one below the other, of our wrapper or of a plain module."""
    module = getattr(model, "module", model) if isinstance(model, LanguageModel) else model
    rows = tokenizer()([*(texts or METALS[:2])])["input_ids"]
    return torch.cat([module(input_ids=torch.tensor([row])).logits[0] for row in rows])
