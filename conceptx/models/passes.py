"""Activations on their way through a module: changed by hooks, or read in a pass that ends where all has been seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from conceptx.models.sites import Site

if TYPE_CHECKING:
    from conceptx.models.language import LanguageModel

Change = Callable[[Tensor], Tensor]


class _Enough(Exception):
    """Ends a forward pass."""


def activations(model: LanguageModel, ids: Tensor, mask: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """{site: (rows, tokens, d)} of one pass over the ids (rows, tokens), which ends at the last of the sites.

    The blocks behind it do not run. Gradients and the mode of the module are as the caller has them.
    """
    places = [model.site(name) for name in sites]
    return seen(model.module, places, lambda: model.module(input_ids=ids, attention_mask=mask, use_cache=False))


def seen(root: nn.Module, sites: Sequence[Site], run: Callable[[], Any]) -> dict[str, Tensor]:
    """{site: what passes it while `run` runs}; `run` ends when all have been seen once."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Change:
        def look(x: Tensor) -> Tensor:
            found[name] = x
            if len(found) == len(sites):
                raise _Enough
            return x

        return look

    hooks = [hook(root, site, keep(site.name)) for site in sites]
    try:
        run()
    except _Enough:
        pass
    finally:
        for handle in hooks:
            handle.remove()
    return found


def hook(root: nn.Module, site: Site, function: Change) -> Any:
    """Pass the activations of a site through a function until `.remove()` of what is returned."""
    module = root.get_submodule(site.module)
    if site.side == "output":
        return _hook_output(module, function)
    if site.argument is not None:
        return hook_argument(module, site.argument, function)
    return module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))


def hook_argument(module: nn.Module, argument: str, function: Change) -> Any:
    """Pass one argument of every call of the module through a function, however the caller hands it over."""
    name, _, entry = argument.partition(".")
    place = list(inspect.signature(module.forward).parameters).index(name)

    def changed(value: Any) -> Any:
        return {**value, entry: function(value[entry])} if entry else function(value)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name in kwargs:
            return args, {**kwargs, name: changed(kwargs[name])}
        return (*args[:place], changed(args[place]), *args[place + 1 :]), kwargs

    return module.register_forward_pre_hook(before, with_kwargs=True)


class _Chain:
    """The functions that a module's output passes, in order, before the hooks of anyone else see it.

    transformers notes hidden states by such a hook, and pipelines read the text there (SDXL: the last but one).
    """

    def __init__(self, module: nn.Module) -> None:
        self.links: list[_Link] = []
        self.handle = module.register_forward_hook(self._pass, prepend=True)

    def _pass(self, _: nn.Module, __: Any, output: Any) -> Any:
        for link in [*self.links]:
            output = _on_first(link.function, output)
        return output


@dataclass(frozen=True, eq=False)
class _Link:
    chain: _Chain
    function: Change

    def remove(self) -> None:
        self.chain.links.remove(self)
        if not self.chain.links:
            self.chain.handle.remove()


_CHAINS: WeakKeyDictionary[nn.Module, _Chain] = WeakKeyDictionary()


def _hook_output(module: nn.Module, function: Change) -> _Link:
    chain = _CHAINS.get(module)
    if chain is None or not chain.links:
        chain = _CHAINS[module] = _Chain(module)
    chain.links.append(link := _Link(chain, function))
    return link


def _on_first(function: Change, output: Any) -> Any:
    """Some layers give a tuple whose first entry is the activation."""
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)
