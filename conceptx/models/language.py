"""`LanguageModel`: a thin wrapper around any causal language model of `transformers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conceptx.edit import Dense, Edit
from conceptx.edit.fold import require_none
from conceptx.edit.host import WHOLE
from conceptx.geometry import ActivationMap, ConceptMap
from conceptx.models.modes import evaluating
from conceptx.models.passes import activations, hook
from conceptx.models.sites import SUBLAYER_INPUTS, Block, Site, block_of, block_sites
from conceptx.models.wrapper import Wrapper, edits_on, refuse_quantised
from conceptx.store import replaced_folder


class LanguageModel(Wrapper):
    """The user's own model and tokenizer, with named sites and parameters in one orientation.

    module:    the `transformers` model; it is never copied or replaced.
    tokenizer: its tokenizer.

    Raises ValueError when the architecture is unknown or the model is quantised.
    """

    def __init__(self, module: Any, tokenizer: Any) -> None:
        self.block: Block = block_of(module.config.model_type)
        refuse_quantised(module)
        self.module = module
        self.tokenizer = tokenizer
        self.applied = edits_on(module)

    # -- what is there -----------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, tuple[str, nn.Module]]:
        """What the fingerprint is taken of, each with its kind."""
        return {WHOLE: (self.module.config.model_type, self.module)}

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.module.get_submodule(self.block.layers))

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every site by name, from the first layer to the last."""
        found = [site for layer in range(self.depth) for site in block_sites(self.block, layer)]
        return {site.name: site for site in found}

    @property
    def default_sites(self) -> tuple[str, ...]:
        """The inputs of all attention and MLP sublayers."""
        return tuple(name for name in self.sites if name.endswith(SUBLAYER_INPUTS))

    def width(self, site: str) -> int:
        """The dimension of the activations at a site."""
        return self._read_width(site) or int(self.module.config.hidden_size)

    def mlp_gain(self, layer: int) -> Tensor:
        """The factors (d,) from a row that the MLP of a layer writes to what `mlp_output` sees of it, but for one
        positive number a token: those of the norm between them, ones where there is none."""
        norm = self.block.mlp_after_norm
        if norm is None:
            return torch.ones(self.width(f"layers.{layer}.mlp_output"))
        weight = self.module.get_submodule(f"{self.block.layers}.{layer}.{norm}").weight.detach().float().cpu()
        return 1 + weight  # Gemma's norms count from one

    def written(self, layer: int) -> tuple[str, str]:
        """The weights that write to the residual stream in a layer: of the attention, and of the MLP, whose columns are
        the value vectors of its neurons."""
        path = f"{self.block.layers}.{layer}"
        return f"{path}.{self.block.attention_writes}.weight", f"{path}.{self.block.mlp_writes}.weight"

    @torch.no_grad()
    def unembed(self, directions: Tensor) -> Tensor:
        """What directions (f, d) of the residual stream do to the logits (f, vocabulary), but for the last norm."""
        head = self.module.get_output_embeddings().weight
        return (directions.to(head.device, head.dtype) @ head.T).float().cpu()

    @cached_property
    def start(self) -> list[int]:
        """The tokens that the tokenizer itself puts before a text (Gemma, Llama 3, Mistral: one; many others: none)."""
        bare, whole = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        return whole[: whole.index(bare[0])] if whole != bare else []

    # -- activations -------------------------------------------------------------------------------------------

    def install(self, site: str, concept_map: ActivationMap) -> Any:
        """Pass the activations of a site through the map until `.remove()` of what is returned.

        Raises ValueError for a map that needs whole prompts: here a text grows token by token.
        """
        if not isinstance(concept_map, ConceptMap):
            raise ValueError("A map of whole prompts acts inside the text encoders of a pipeline, not in this model.")
        return self.hook(self.site(site), concept_map.to(self.device))

    def record(
        self, texts: Sequence[str], sites: Sequence[str], *, batch_size: int = 32
    ) -> Iterator[dict[str, Tensor]]:
        """Run the texts, a batch at a time; yields {site: (tokens, d)} with padding left out, in the texts' order.

        The forward pass ends at the last of the sites. Raises ValueError for an empty list or text.
        """
        wanted = [self.site(name).name for name in sites]
        for batch in batches(self.encode(texts), batch_size):
            ids, mask = self.pad([[*self.start, *row] for row in batch])
            texts_only = mask.clone()
            texts_only[:, : len(self.start)] = 0
            yield self._record(ids, mask, texts_only.bool(), wanted)

    @torch.no_grad()
    def _record(self, ids: Tensor, mask: Tensor, kept: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        with evaluating(self.module):
            return {name: states[kept] for name, states in activations(self, ids, mask, sites).items()}

    def hook(self, site: Site, function: Callable[[Tensor], Tensor]) -> Any:
        """Pass the activations of a site through a function until `.remove()` of what is returned."""
        return hook(self.module, site, function)

    # -- texts -------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, without special tokens: whatever reads them puts `start` before them.

        Raises ValueError for an empty list or text.
        """
        if not len(texts):
            raise ValueError("No text was given.")
        if blank := [number for number, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"{len(blank)} of {len(texts)} texts are blank, the first is number {blank[0]}.")
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [row[:max_length] for row in ids]

    def lengths(self, texts: Sequence[str], site: str) -> list[int]:
        """How many tokens `record` gives of each text. Raises ValueError for an empty list or text."""
        return [len(row) for row in self.encode(texts)]

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """(ids, mask) of shape (rows, longest) on the model's device."""
        longest = max(map(len, rows))
        fill = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(rows), longest), fill)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[number, place] = torch.tensor(row)
            mask[number, place] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def predict(
        self,
        rows: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
        last: int | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """log p(next token) after each of the `last` tokens of every row (default: all), float32.

        rows: token ids.  prefix: ids that come before every row; they are read once, not once a row.
        Returns (rows, last, vocabulary), aligned at the end: [:, -1] is the prediction after a row's last token.
        Entries before the beginning of a short row mean nothing.
        """
        prefix = [*self.start, *prefix]
        if prefix and self._slides(len(prefix) + max(map(len, rows))):  # a window would count the padding between
            last = last or max(map(len, rows))
            rows, prefix = [[*prefix, *row] for row in rows], []
        ids, mask = self.pad(rows, left=True)
        places = (mask.cumsum(1) - 1).clamp(min=0) + len(prefix)
        cache = self._read(prefix, len(rows)) if prefix else None
        with evaluating(self.module):
            out = self.module(
                input_ids=ids,
                attention_mask=torch.cat([mask.new_ones(len(rows), len(prefix)), mask], 1),
                position_ids=places,
                past_key_values=cache,
                use_cache=cache is not None,
                **({} if last is None else {"logits_to_keep": last}),
            )
        return (out.logits.float() / temperature).log_softmax(-1)

    def log_likelihoods(
        self, rows: Sequence[Sequence[int]], skip: Sequence[int], *, prefix: Sequence[int] = (), batch_size: int = 8
    ) -> list[Tensor]:
        """log p of every token of every row after its first `skip` tokens (at least one), given the prefix.

        Raises ValueError when nothing of a row is left.
        """
        if short := [n for n, (row, first) in enumerate(zip(rows, skip, strict=True)) if not 0 < first < len(row)]:
            raise ValueError(f"Row {short[0]} has {len(rows[short[0]])} tokens, {skip[short[0]]} are to be skipped.")
        found = []
        for chunk in batches(range(len(rows)), batch_size):
            log_p = self.predict([rows[i] for i in chunk], prefix=prefix)
            for number, i in enumerate(chunk):
                wanted = torch.tensor(rows[i][skip[i] :], device=log_p.device)
                found.append(log_p[number, -len(wanted) - 1 : -1].gather(1, wanted[:, None])[:, 0].cpu())
        return found

    def _read(self, prefix: Sequence[int], rows: int) -> Any:
        """The keys and values of the prefix, repeated for every row."""
        ids = torch.tensor([list(prefix)], device=self.device)
        with evaluating(self.module):
            cache = self.module(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(rows)
        return cache

    def _slides(self, tokens: int) -> bool:
        """Whether some layer does not see all of that many tokens."""
        window = getattr(self.module.config, "sliding_window", None)
        return window is not None and tokens > window

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int = 40, seed: int | None = None, **options: Any
    ) -> list[str]:
        """Continuations of the prompts: greedy, or sampled when a seed is given. Options go to `transformers`."""
        ids, mask = self.pad([[*self.start, *row] for row in self.encode(prompts)], left=True)
        asked = {key: value for handle in self.applied for key, value in handle.edit.generation.items()}
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), evaluating(self.module):
            if seed is not None:
                torch.manual_seed(seed)
            out = self.module.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=seed is not None,
                pad_token_id=self.tokenizer.pad_token_id or 0,
                **{**asked, **options},
            )
        return self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    # -- the edited model as an ordinary checkpoint ------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, edit: Edit) -> None:
        """Write the model with the edit merged into its weights, for plain `transformers`; the model itself stays.

        Maps are folded first. Raises ValueError when a map cannot be folded or the architecture has no place for a
        bias that folding needs, or when an edit is in force; then nothing is written.
        """
        self.require_unedited()
        folded = edit.fold(self)
        require_none(folded.maps)
        switches, zeros = self.bias_room(name for name in folded.deltas if self.parameter(name) is None)
        complete = replace(folded, deltas={**folded.deltas, **zeros})
        with replaced_folder(Path(folder)) as temporary, complete.applied(self), _set(self.module.config, switches):
            self.module.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)

    def bias_room(self, names: Iterable[str]) -> tuple[dict[str, bool], dict[str, Dense]]:
        """The configuration switches that make room for new biases, and zeros for the others they bring.

        Raises ValueError when the architecture has no place for one of them.
        """
        new = set(names)
        switches: dict[str, bool] = {}
        zeros: dict[str, Dense] = {}
        for switch, modules in self.block.bias_switches().items():
            inside = {f"{self.block.layers}.{n}.{module}.bias" for n in range(self.depth) for module in modules}
            if not new & inside:
                continue
            if not hasattr(self.module.config, switch):
                continue
            switches[switch] = True
            absent = (name for name in sorted(inside - new) if self.parameter(name) is None)
            zeros |= {name: Dense(torch.zeros(self.parameter_shape(name))) for name in absent}
            new -= inside
        super().bias_room(new)
        return switches, zeros


@contextmanager
def _set(config: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes set for the length of a block."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
