"""Where activations can be read and changed: a table for each family of architectures.

An architecture that is not in the table is an error, never a silent no-op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

SUBLAYER_INPUTS = ("attention_input", "mlp_input")  # how the names of foldable sites behind a norm end


@dataclass(frozen=True)
class Site:
    """A named place that activations pass.

    module:  path of the hooked module.
    side:    whether its input or its output is the activation.
    readers: paths of the linear layers that read this activation and nothing else does (empty: not foldable).
    argument: which input it is, by its keyword (None: the first).
    """

    name: str
    module: str
    side: Literal["input", "output"]
    readers: tuple[str, ...] = ()
    argument: str | None = None


@dataclass(frozen=True)
class Block:
    """Names inside one transformer block: the linear layers behind a norm, and the one that ends a sublayer.

    mlp_after_norm: a norm between the MLP and the residual stream, where there is one.
    """

    layers: str
    attention_norm: str
    attention_reads: tuple[str, ...]
    attention_writes: str
    mlp_norm: str
    mlp_reads: tuple[str, ...]
    mlp_writes: str
    mlp_after_norm: str | None = None

    def bias_switches(self) -> dict[str, tuple[str, ...]]:
        """The configuration fields by which Llama-like models get biases, with the linear layers each one governs."""
        return {
            "attention_bias": (*self.attention_reads, self.attention_writes),
            "mlp_bias": (*self.mlp_reads, self.mlp_writes),
        }


LLAMA = Block(
    layers="model.layers",
    attention_norm="input_layernorm",
    attention_reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_writes="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp_reads=("mlp.gate_proj", "mlp.up_proj"),
    mlp_writes="mlp.down_proj",
)
GEMMA2 = replace(LLAMA, mlp_norm="pre_feedforward_layernorm", mlp_after_norm="post_feedforward_layernorm")
PHI3 = replace(LLAMA, attention_reads=("self_attn.qkv_proj",), mlp_reads=("mlp.gate_up_proj",))
GPT2 = Block(
    layers="transformer.h",
    attention_norm="ln_1",
    attention_reads=("attn.c_attn",),
    attention_writes="attn.c_proj",
    mlp_norm="ln_2",
    mlp_reads=("mlp.c_fc",),
    mlp_writes="mlp.c_proj",
)
GPT_NEOX = Block(
    layers="gpt_neox.layers",
    attention_norm="input_layernorm",
    attention_reads=("attention.query_key_value",),
    attention_writes="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_reads=("mlp.dense_h_to_4h",),
    mlp_writes="mlp.dense_4h_to_h",
)

ARCHITECTURES: dict[str, Block] = {
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
}


def block_of(model_type: str) -> Block:
    """The table of an architecture. Raises ValueError that names the known ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(f"Unknown language-model architecture {model_type!r}; known: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[model_type]


def block_sites(block: Block, layer: int) -> list[Site]:
    """The six sites of a layer, in the order in which activations pass them.

    attention_input and mlp_input lie behind the norms; attention_heads and mlp_hidden before the last linear layer of
    a sublayer; mlp_output is what the MLP adds to the residual stream; output is the residual stream after the block.
    """
    path, name = f"{block.layers}.{layer}", f"layers.{layer}"

    def inside(*modules: str) -> tuple[str, ...]:
        return tuple(f"{path}.{module}" for module in modules)

    attention_out, mlp_out = inside(block.attention_writes, block.mlp_writes)
    attention_norm, mlp_norm = inside(block.attention_norm, block.mlp_norm)
    mlp_added = f"{path}.{block.mlp_after_norm or block.mlp_writes}"
    return [
        Site(f"{name}.attention_input", attention_norm, "output", inside(*block.attention_reads)),
        Site(f"{name}.attention_heads", attention_out, "input", (attention_out,)),
        Site(f"{name}.mlp_input", mlp_norm, "output", inside(*block.mlp_reads)),
        Site(f"{name}.mlp_hidden", mlp_out, "input", (mlp_out,)),
        Site(f"{name}.mlp_output", mlp_added, "output"),
        Site(f"{name}.output", path, "output"),
    ]
