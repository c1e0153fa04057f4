"""A forward pass that ends where everything asked for has been seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from conceptx.models.language import LanguageModel


class _Enough(Exception):
    """Ends a forward pass."""


def activations(model: LanguageModel, ids: Tensor, mask: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """{site: (rows, tokens, d)} of one pass over the ids (rows, tokens), which ends at the last of the sites.

    The blocks behind it do not run. Gradients and the mode of the module are as the caller has them.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            seen[name] = x
            if len(seen) == len(sites):
                raise _Enough
            return x

        return look

    hooks = [model.hook(model.site(name), keep(name)) for name in sites]
    try:
        model.module(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen
