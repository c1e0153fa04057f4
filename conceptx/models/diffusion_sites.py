"""What reads the text inside the denoiser of a diffusers pipeline, and the blocks of its text encoders: tables.

Layers of a denoiser are found by what they read, never by a class name or a pattern that another release may not have.
A denoiser or text encoder that is not in its table, or a table that matches no layer, is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conceptx.models.passes import hook, hook_argument
from conceptx.models.sites import Site

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# where the blocks of a text encoder lie: the path inside it ends so
BLOCKS = {
    "CLIPTextModel": "encoder.layers",
    "CLIPTextModelWithProjection": "encoder.layers",
    "T5EncoderModel": "encoder.block",
}


@dataclass(frozen=True)
class Denoiser:
    """One architecture.

    component:      attribute of the pipeline that holds it.
    text_readers:   the linear layers (paths inside the denoiser) that read the token rows.
    pooled:         argument that carries the pooled text vector (a dot leads into a dictionary), or None.
    pooled_readers: the linear layers that read it and nothing else does.
    tokenizer:      attribute of the pipeline whose tokens number the rows.
    packed:         whether the denoiser takes latents as a row of 2x2 patches (FLUX).
    """

    component: str
    text_readers: Callable[[nn.Module], list[str]]
    pooled: str | None = None
    pooled_readers: tuple[str, ...] = ()
    tokenizer: str = "tokenizer"
    packed: bool = False


def _cross_attention(unet: nn.Module) -> list[str]:
    """Keys and values that every attention makes of another sequence than the image's own.

    With `encoder_hid_proj` those read what that layer makes of the text; then it is the only reader.
    """
    if getattr(unet, "encoder_hid_proj", None) is not None:
        return ["encoder_hid_proj"]
    found = []
    for path, module in unet.named_modules():
        if getattr(module, "added_kv_proj_dim", None) is not None:  # text beside the image's own keys and values
            found += [f"{path}.add_k_proj", f"{path}.add_v_proj"]
        elif getattr(module, "is_cross_attention", False):
            found += [f"{path}.to_k", f"{path}.to_v"]
    return found


UNET = Denoiser("unet", _cross_attention)
UNET_XL = Denoiser("unet", _cross_attention, pooled="added_cond_kwargs.text_embeds")
SD3 = Denoiser(
    "transformer",
    lambda _: ["context_embedder"],
    pooled="pooled_projections",
    pooled_readers=("time_text_embed.text_embedder.linear_1",),
)
FLUX = Denoiser(
    "transformer",
    lambda _: ["context_embedder"],
    pooled="pooled_projections",
    pooled_readers=("time_text_embed.text_embedder.linear_1",),
    tokenizer="tokenizer_2",
    packed=True,
)
# (class of the denoiser, what a U-Net adds to its time embedding)
ARCHITECTURES: dict[tuple[str, str | None], Denoiser] = {
    ("UNet2DConditionModel", None): UNET,
    ("UNet2DConditionModel", "text_time"): UNET_XL,
    ("SD3Transformer2DModel", None): SD3,
    ("FluxTransformer2DModel", None): FLUX,
}


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """The text encoders that a pipeline has, by the names of its components."""
    return {name: part for name in TEXT_ENCODERS if (part := getattr(pipeline, name, None)) is not None}


def denoiser_of(pipeline: Any) -> Denoiser:
    """The table of a pipeline's denoiser.

    Raises ValueError that names what is known, for another denoiser or text encoder, or for a pipeline that lacks a
    text encoder or needs more than a prompt.
    """
    module = next((m for n in ("unet", "transformer") if (m := getattr(pipeline, n, None)) is not None), None)
    if module is None:
        raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer.")
    added = getattr(module.config, "addition_embed_type", None)
    key = (type(module).__name__, added)
    if key not in ARCHITECTURES:
        known = ", ".join(name + (f" with addition_embed_type {a!r}" if a else "") for name, a in ARCHITECTURES)
        raise ValueError(
            f"Unknown denoiser {key[0]}{f' with addition_embed_type {added!r}' if added else ''}; known: {known}."
        )
    if getattr(module.config, "encoder_hid_dim_type", None) not in (None, "text_proj"):
        raise ValueError(
            f"Unknown encoder_hid_dim_type {module.config.encoder_hid_dim_type!r}; known: None, 'text_proj'."
        )
    for encoder in text_encoders(pipeline).values():
        if type(encoder).__name__ not in BLOCKS:
            raise ValueError(f"Unknown text encoder {type(encoder).__name__}; known: {', '.join(BLOCKS)}.")
    needed = (ARCHITECTURES[key].tokenizer, ARCHITECTURES[key].tokenizer.replace("tokenizer", "text_encoder"))
    if missing := [name for name in needed if getattr(pipeline, name, None) is None]:
        raise ValueError(f"The pipeline has no {missing[0]}, by whose tokens the rows of a prompt are counted.")
    if "image" in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} starts from an image; wrap the text-to-image pipeline instead.")
    return ARCHITECTURES[key]


def text_sites(denoiser: Denoiser, module: nn.Module, encoders: Mapping[str, nn.Module]) -> list[Site]:
    """The sites of a pipeline: "text", "pooled" where there is one, then "text_encoder.layers.0" and so on: what block
    0 of a text encoder gives (the residual stream).

    Raises ValueError when no layer of the denoiser reads the text.
    """

    def inside(paths: list[str] | tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{denoiser.component}.{path}" for path in paths)

    readers = denoiser.text_readers(module)
    if not readers:
        raise ValueError(f"No layer of this {type(module).__name__} reads the text; there is nothing to erase from.")
    sites = [Site("text", denoiser.component, "input", inside(readers), "encoder_hidden_states")]
    if denoiser.pooled is not None:
        sites.append(Site("pooled", denoiser.component, "input", inside(denoiser.pooled_readers), denoiser.pooled))
    return sites + [site for name, encoder in encoders.items() for site in _blocks(name, encoder)]


def _blocks(name: str, encoder: nn.Module) -> list[Site]:
    """The output of every block of a text encoder, from the first to the last."""
    end = BLOCKS[type(encoder).__name__]
    path, blocks = next((p, m) for p, m in encoder.named_modules() if f".{p}".endswith(f".{end}"))
    return [
        Site(f"{name}.layers.{number}", f"{name}.{path}.{number}", "output")
        for number, _ in enumerate(blocks.children())
    ]


def real_tokens(ids: Tensor, end: int) -> Tensor:
    """(n, tokens): which tokens of prompts are no padding, namely all up to and with the first `end` of each."""
    ends = ids == end
    return ends.cumsum(1) - ends.long() == 0


@dataclass(frozen=True, eq=False)
class _Hooks:
    handles: tuple[Any, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def hook_prompts(root: nn.Module, site: Site, end: int, function: Callable[[Tensor, Tensor], Tensor]) -> _Hooks:
    """Pass what a block gives of whole prompts through function(states, real) until `.remove()` of what is returned.

    states (n, tokens, d), real (n, tokens) of `real_tokens`, by the ids that the text encoder was called with.
    """
    real: list[Tensor] = []

    def note(ids: Tensor) -> Tensor:
        real[:] = [real_tokens(ids, end)]
        return ids

    encoder = root.get_submodule(site.name.partition(".")[0])
    return _Hooks((hook_argument(encoder, "input_ids", note), hook(root, site, lambda x: function(x, real[0]))))
