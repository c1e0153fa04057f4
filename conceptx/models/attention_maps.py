"""Where a U-Net looks: the probabilities of its cross-attention, kept while it computes, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from conceptx.models.diffusion import DiffusionModel

KEYS = ".to_k"


def cross_attentions(model: DiffusionModel) -> tuple[str, ...]:
    """Paths of the attention layers whose keys and values are made of the token rows.

    Raises ValueError where something else reads them, as in the joint attention of SD 3 and FLUX.
    """
    if other := [path for path in model.projections if not path.endswith((KEYS, ".to_v"))]:
        raise ValueError(
            f"The text is read by {other[0]}; there are no cross-attention maps as in the U-Net of SD 1, 2 and SDXL."
        )
    return tuple(path.removesuffix(KEYS) for path in model.projections if path.endswith(KEYS))


@contextmanager
def captured(model: DiffusionModel) -> Iterator[dict[str, Float[Tensor, "n heads pixels tokens"]]]:
    """A dictionary that the denoiser fills: path -> probabilities of its latest pass, over the tokens, after softmax.

    They are computed beside the layer's own arithmetic, whatever attention processor does that, so what the denoiser
    predicts is the same bit for bit. Gradients go back through them. On exit, also after an error, nothing is left.
    """
    maps: dict[str, Tensor] = {}

    def kept(path: str) -> Callable[..., None]:
        def look(attention: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            maps[path] = probabilities(attention, *args, **kwargs)

        return look

    layers = {path: model.module.get_submodule(path) for path in cross_attentions(model)}
    hooks = [layer.register_forward_pre_hook(kept(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def probabilities(
    attention: Any,
    hidden_states: Float[Tensor, "n pixels c"],
    encoder_hidden_states: Float[Tensor, "n tokens d"],
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Float[Tensor, "n heads pixels tokens"]:
    """softmax(Q K' / sqrt(width of a head)) of one attention layer, by its own `get_attention_scores`."""
    n, tokens, _width = encoder_hidden_states.shape
    if attention_mask is not None:
        attention_mask = attention.prepare_attention_mask(attention_mask, tokens, n)
    queries, keys = attention.to_q(hidden_states), attention.to_k(encoder_hidden_states)
    scores = map(attention.head_to_batch_dim, (queries, keys))
    return attention.get_attention_scores(*scores, attention_mask).unflatten(0, (n, attention.heads))
