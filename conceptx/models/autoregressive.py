"""`ARImageModel`: a thin wrapper around a model of `transformers` that draws token by token (the Janus family)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conceptx.edit import Edit, Fingerprint
from conceptx.edit.fold import require_none
from conceptx.edit.host import WHOLE
from conceptx.geometry import ActivationMap, ConceptMap
from conceptx.models.encoded import Prompts
from conceptx.models.language import batches
from conceptx.models.modes import evaluating
from conceptx.models.passes import hook, seen
from conceptx.models.sites import LLAMA, SUBLAYER_INPUTS, Site, block_sites
from conceptx.models.wrapper import Wrapper, edits_on, refuse_quantised
from conceptx.progress import track
from conceptx.store import replaced_folder
from conceptx.words import whole_words

FAMILIES = ("janus",)
DECODER = "model.language_model"
BLOCK = replace(LLAMA, layers=f"{DECODER}.layers")
EMBEDDING = f"{DECODER}.embed_tokens"
HEAD = "model.generation_head"
PROMPT = "prompt."  # before the name of a site: of the prompt's tokens alone
MARK = "\ue000"  # stands for the prompt while the chat template is looked at
DEFAULT_GUIDANCE = 5.0  # what the published models were drawn with


@dataclass(frozen=True, eq=False)
class ImagePrompts:
    """n prompts as the decoder reads them, up to the begin-of-image token, padded on the left.

    ids, mask: (n, length).
    """

    texts: tuple[str, ...]
    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Sequence[int]) -> ImagePrompts:
        """These of the prompts, in this order; a number may come more than once."""
        places = torch.as_tensor(list(rows), dtype=torch.long, device=self.ids.device)
        return ImagePrompts(tuple(self.texts[i] for i in rows), self.ids[places], self.mask[places])

    def __add__(self, other: ImagePrompts) -> ImagePrompts:
        """These prompts, then the others."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        parts = [[F.pad(t, (longest - t.shape[1], 0)) for t in (p.ids, p.mask)] for p in (self, other)]
        ids, mask = (torch.cat(pair) for pair in zip(*parts, strict=True))
        return ImagePrompts(self.texts + other.texts, ids, mask)


class ARImageModel(Wrapper):
    """The user's own model and processor; pictures are sequences of image tokens after a prompt.

    module:    the `transformers` model; it is never copied or replaced.
    processor: its processor, which holds tokenizer, chat template and the begin-of-image token.
    guidance:  strength of the classifier-free guidance where `generate` is given none (None: the model's own).

    Sites: "text", the rows of a prompt's tokens that the decoder reads (image tokens do not pass it); those of the
    decoder's layers, as a language model has them, which text and image tokens pass; the same with "prompt." before
    them, where a map acts on the prompt's tokens alone (and so cannot be folded); and "image_head", from which image
    tokens are predicted.

    Raises ValueError when the architecture is unknown, the model is quantised, or the tokenizer tells no offsets.
    """

    def __init__(self, module: Any, processor: Any, *, guidance: float | None = None) -> None:
        kind = module.config.model_type
        if kind not in FAMILIES:
            raise ValueError(f"Unknown autoregressive image model {kind!r}; known: {', '.join(FAMILIES)}.")
        refuse_quantised(module)
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise ValueError("The model needs its processor, with a fast tokenizer: wrap(model, processor).")
        self.module = module
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.guidance = guidance
        self.applied = edits_on(module)

    # -- what is there -----------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, tuple[str, nn.Module]]:
        """What the fingerprint is taken of, with its kind."""
        return {WHOLE: (self.module.config.model_type, self.module)}

    @property
    def text_fingerprint(self) -> Fingerprint:
        """Of all of it: prompts and pictures are read by one decoder."""
        return self.fingerprint

    @property
    def depth(self) -> int:
        """The number of the decoder's layers."""
        return len(self.module.get_submodule(BLOCK.layers))

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """Every site by name: the prompt's rows, the layers from first to last, the head of the image tokens."""
        layers = [site for layer in range(self.depth) for site in block_sites(BLOCK, layer)]
        prompts = [replace(s, name=PROMPT + s.name, readers=()) for s in layers if s.name.endswith(SUBLAYER_INPUTS)]
        text = Site("text", EMBEDDING, "output")
        head = Site("image_head", HEAD, "input", (f"{HEAD}.proj_out",))
        return {site.name: site for site in (text, *prompts, *layers, head)}

    @property
    def default_sites(self) -> tuple[str, ...]:
        """The inputs of all attention and MLP sublayers, of the prompt's tokens."""
        return tuple(name for name in self.sites if name.startswith(PROMPT))

    def width(self, site: str) -> int:
        """The dimension of the activations at a site."""
        return self._read_width(site) or int(self.module.config.text_config.hidden_size)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers that read the rows of "text" directly: none, since a norm stands between."""
        return ()

    def attention(self, layer: int) -> tuple[str, ...]:
        """The weights of q, k, v and o of a layer's attention."""
        path = f"{BLOCK.layers}.{layer}"
        return tuple(f"{path}.{name}.weight" for name in (*BLOCK.attention_reads, BLOCK.attention_writes))

    @property
    def image_tokens(self) -> int:
        """How many tokens a picture has."""
        return int(self.module.model.vision_model.config.num_image_tokens)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def install(self, site: str, concept_map: ActivationMap) -> Any:
        """Pass the activations of a site through the map until `.remove()` of what is returned.

        Raises ValueError for a map that needs whole prompts: here a picture grows token by token.
        """
        if not isinstance(concept_map, ConceptMap):
            raise ValueError("A map of whole prompts acts inside the text encoders of a pipeline, not in this model.")
        place, here = self.site(site), concept_map.to(self.device)
        return _PromptHooks(self.module, place, here) if site.startswith(PROMPT) else hook(self.module, place, here)

    # -- prompts -----------------------------------------------------------------------------------------------

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the chat template puts before and after a prompt."""
        if self.tokenizer.chat_template is None and getattr(self.processor, "chat_template", None) is None:
            return "", ""
        message = [{"role": "user", "content": [{"type": "text", "text": MARK}]}]
        before, _, after = self.processor.apply_chat_template(message, add_generation_prompt=True).partition(MARK)
        return before, after

    @cached_property
    def begin(self) -> int:
        """The begin-of-image token."""
        return int(self.tokenizer.convert_tokens_to_ids(self.processor.image_start_token))

    @property
    def _pad(self) -> int:
        found = self.module.generation_config.pad_token_id
        return int(self.tokenizer.pad_token_id if found is None else found)

    @property
    def context(self) -> int:
        """How many tokens of a prompt are counted at most."""
        return int(self.tokenizer.model_max_length)

    def _framed(self, prompt: str) -> str:
        before, after = self._frame
        return f"{before}{prompt}{after}{self.processor.image_start_token}"

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens by which rows are counted: those of the whole prompt, with what the template adds.

        Raises ValueError when there are more than the tokenizer allows.
        """
        ids = self.tokenizer(self._framed(prompt)).input_ids
        if len(ids) > self.context:
            raise ValueError(f"The prompt {prompt[:60]!r} has {len(ids)} tokens, the model reads {self.context}.")
        return ids

    def span(self, prompt: str) -> tuple[int, int]:
        """(first, end): the places of the prompt's own tokens among `token_ids`; equal for the empty prompt."""
        start = len(self._frame[0])
        return self._overlap(prompt, start, start + len(prompt))

    def subject_end(self, prompt: str, name: str) -> int:
        """The place of the last token of `name` in the prompt (of its last mention).

        Upper and lower case are the same. Raises ValueError when the prompt does not hold the name as whole words.
        """
        found = list(whole_words(name).finditer(prompt))
        if not found:
            raise ValueError(f"The prompt {prompt!r} does not hold {name!r} as whole words.")
        start = len(self._frame[0])
        return self._overlap(prompt, *(start + place for place in found[-1].span()))[1] - 1

    def _overlap(self, prompt: str, start: int, stop: int) -> tuple[int, int]:
        """The tokens that share characters with a part of the framed prompt."""
        offsets = self.tokenizer(self._framed(prompt), return_offsets_mapping=True).offset_mapping
        inside = [n for n, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        if inside:
            return inside[0], inside[-1] + 1
        first = next(n for n, (a, b) in enumerate(offsets) if a >= start and b > a)
        return first, first

    def prompts(self, texts: Sequence[str]) -> ImagePrompts:
        """The prompts as the decoder reads them. Raises ValueError for an empty list and for a prompt too long."""
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"A list of at least one prompt is needed, got {texts!r}.")
        rows = [self.token_ids(text) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ImagePrompts(tuple(texts), ids.to(self.device), mask.to(self.device))

    def unconditional(self, prompts: ImagePrompts) -> ImagePrompts:
        """The same rows with every token but the first and the begin-of-image token replaced by the padding token."""
        kept = (prompts.ids == self.tokenizer.bos_token_id) | (prompts.ids == self.begin)
        return ImagePrompts(("",) * len(prompts), prompts.ids.masked_fill(~kept, self._pad), prompts.mask)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Prompts:
        """The rows that pass the site "text", with the places of the prompts' own tokens in them.

        Each row is a function of its token alone. `end` is the first token of the template behind the prompt. Prompts
        are padded on the right, to their longest; so `trimmed` changes nothing.
        Raises ValueError for an empty list and for a prompt too long.
        """
        asked = self.prompts(prompts)
        spans = torch.tensor([self.span(text) for text in prompts], device=self.device)
        lengths = asked.mask.sum(1)
        places = torch.arange(asked.ids.shape[1], device=self.device)
        ids = asked.ids.gather(1, (places + asked.ids.shape[1] - lengths[:, None]).clamp(max=asked.ids.shape[1] - 1))
        ids = torch.where(places < lengths[:, None], ids, self._pad)
        states = self.module.get_submodule(EMBEDDING)(ids)
        return Prompts(tuple(prompts), states, None, spans[:, 0], spans[:, 1])

    # -- states ------------------------------------------------------------------------------------------------

    def lengths(self, texts: Sequence[str], site: str) -> list[int]:
        """How many tokens `record` gives of each text. Raises ValueError for an empty list and KeyError for no site."""
        self.site(site)
        if not len(texts):
            raise ValueError("No text was given.")
        return [end - first for first, end in map(self.span, texts)]

    @torch.no_grad()
    def record(
        self, texts: Sequence[str], sites: Sequence[str], *, batch_size: int = 32
    ) -> Iterator[dict[str, Tensor]]:
        """Read the texts as prompts, a batch at a time; yields {site: (tokens, d)} of the texts' own tokens, in order.

        The pass ends at the last of the sites. Raises ValueError for an empty list, KeyError for an unknown site.
        """
        places = [self.site(name) for name in sites]
        for batch in batches(texts, batch_size):
            asked = self.prompts(batch)
            kept = self._own(asked)
            with evaluating(self.module):
                found = seen(self.module, places, partial(self._read, asked))
            yield {name: found[name][kept] for name in sites}

    def _own(self, prompts: ImagePrompts) -> Tensor:
        """(n, length), true at the tokens of the prompts themselves."""
        kept = torch.zeros_like(prompts.mask, dtype=torch.bool)
        for row, text in enumerate(prompts.texts):
            first, end = self.span(text)
            padding = prompts.ids.shape[1] - int(prompts.mask[row].sum())
            kept[row, padding + first : padding + end] = True
        return kept

    @torch.no_grad()
    def record_images(self, prompts: ImagePrompts, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """{site: (n, t, d)}: at the places from which each of the image tokens (n, t) is predicted."""
        places = [self.site(name) for name in sites]
        with evaluating(self.module):
            found = seen(self.module, places, lambda: self._head(self.predict(prompts, tokens[:, :-1])))
        return {name: found[name][:, -tokens.shape[1] :] for name in sites}

    def predict(self, prompts: ImagePrompts, tokens: Tensor, *, since: int = 0) -> Tensor:
        """Hidden states (n, t + 1 - since, d) from which image tokens since, …, t are predicted, after tokens (n, t).

        The state that predicts token i has seen the prompt and the tokens before i.
        since: what comes before is read into the cache first, without gradients: those of a window reach back to its
               beginning only, and so does the memory.
        Raises ValueError when `since` lies behind the tokens.
        """
        if not 0 <= since <= tokens.shape[1]:
            raise ValueError(f"There are {tokens.shape[1]} image tokens, a window cannot begin at {since}.")
        return self._read(prompts, tokens, since=since)[:, -(tokens.shape[1] + 1 - since) :]

    def predict_prompts(self, prompts: ImagePrompts) -> Tensor:
        """Hidden states (n, length, d) of all tokens of the prompts."""
        return self._read(prompts)

    def predict_alone(self, tokens: Tensor) -> Tensor:
        """Hidden states (n, t, d) of image tokens, each read by itself: no prompt, no token before it, place 0."""
        rows = self.embed(tokens).flatten(0, 1)[:, None]
        states = self._decode(rows, rows.new_ones(rows.shape[:2], dtype=torch.long), 0, None)
        return states.view(*tokens.shape, -1)

    def logits(self, states: Tensor) -> Tensor:
        """(…, codes): scores of the next image token from hidden states (…, d)."""
        return self._head(states)

    def embed(self, tokens: Tensor) -> Tensor:
        """The rows (n, t, d) that the decoder reads of image tokens (n, t)."""
        return self.module.prepare_embeddings_for_image_generation(tokens)

    @property
    def _head(self) -> nn.Module:
        return self.module.get_submodule(HEAD)

    def _read(self, prompts: ImagePrompts, tokens: Tensor | None = None, *, since: int = 0) -> Tensor:
        """The states of the prompts and what follows; with `since`, from the place that predicts that token on."""
        rows, mask = self.module.get_input_embeddings()(prompts.ids), prompts.mask
        if tokens is not None:
            rows = torch.cat([rows, self.embed(tokens)], 1)
            mask = F.pad(mask, (0, tokens.shape[1]), value=1)
        if not since:
            return self._decode(rows, mask, 0, None)
        from transformers import DynamicCache

        start, cache = prompts.ids.shape[1] - 1 + since, DynamicCache()
        with torch.no_grad():
            self._decode(rows[:, :start], mask[:, :start], 0, cache)
        return self._decode(rows[:, start:], mask, start, cache)

    def _decode(self, rows: Tensor, mask: Tensor, start: int, cache: Any) -> Tensor:
        """The last states of rows (n, t, d) that stand behind `start` cached ones; mask (n, start + t)."""
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return self.module.get_submodule(DECODER)(
            inputs_embeds=rows,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    # -- pictures ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: ImagePrompts,
        *,
        seeds: Sequence[int],
        guidance: float | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """Image tokens (n, `image_tokens`), drawn one after the other with a cache of keys and values.

        Logits are l(masked) + guidance (l(prompt) - l(masked)), divided by the temperature; 0: the likeliest token.
        None: as `generate` says.  Row i depends on prompt i and seed i alone.
        Raises FloatingPointError when the model predicts NaN.
        """
        from transformers import DynamicCache

        strength, heat, count = self._strength(guidance), self._heat(temperature), len(prompts)
        asked = prompts if strength == 1 else prompts + self.unconditional(prompts)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        cache, mask = DynamicCache(), asked.mask
        found: list[Tensor] = []
        with evaluating(self.module):
            states = self._decode(self.module.get_input_embeddings()(asked.ids), mask, 0, cache)
            while True:
                logits = self._head(states[:, -1]).float()
                if len(asked) > count:
                    logits = logits[count:] + strength * (logits[:count] - logits[count:])
                found.append(_drawn(logits, draws, heat))
                if len(found) == self.image_tokens:
                    return torch.stack(found, 1)
                mask = F.pad(mask, (0, 1), value=1)
                row = self.embed(found[-1].repeat(len(asked) // count)[:, None])
                states = self._decode(row, mask, mask.shape[1] - 1, cache)

    def _strength(self, guidance: float | None) -> float:
        own = getattr(self.module.generation_config, "guidance_scale", None)
        return next(float(g) for g in (guidance, self.guidance, own, DEFAULT_GUIDANCE) if g is not None)

    def _heat(self, temperature: float | None) -> float:
        own = getattr(self.module.generation_config, "temperature", None)
        return next(float(t) for t in (temperature, own, 1.0) if t is not None)

    def _pixels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread (3, 1, 1) by which the processor scales pictures."""
        settings = self.processor.image_processor
        return like.new_tensor(settings.image_mean)[:, None, None], like.new_tensor(settings.image_std)[:, None, None]

    @torch.no_grad()
    def to_images(self, tokens: Tensor) -> Tensor:
        """Pictures (n, 3, h, w) in [0, 1] of image tokens (n, `image_tokens`)."""
        made = self.module.model.vqmodel.decode(tokens).float()
        mean, spread = self._pixels(made)
        return (made * spread + mean).clamp(0, 1)

    @torch.no_grad()
    def to_tokens(self, images: Tensor) -> Tensor:
        """Image tokens (n, `image_tokens`) of pictures (n, 3, h, w) in [0, 1] of the model's own size."""
        mean, spread = self._pixels(images)
        pixels = ((images - mean) / spread).to(self.device, self.dtype)
        return self.module.model.vqmodel.encode(pixels).image_tokens.view(len(images), -1)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: float | None = None,
        temperature: float | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Images (n, 3, height, width) in [0, 1] on the CPU; image i comes from prompts[i] and seeds[i] alone.

        guidance: 1 is none; default: the wrapper's, else that of the model's generation configuration, else 5.
        temperature: of the sampling; default: the model's, else 1.
        Raises ValueError when seeds and prompts differ in number, or a prompt is too long.
        """
        if isinstance(prompts, str) or not len(prompts) or len(prompts) != len(seeds):
            raise ValueError(f"generate takes a list of prompts and as many seeds, got {prompts!r} and {seeds!r}.")
        asked = self.prompts(prompts)
        parts = []
        for rows in track(list(batches(range(len(prompts)), batch_size)), "images"):
            some = self.sample(
                asked.select(rows), seeds=[seeds[i] for i in rows], guidance=guidance, temperature=temperature
            )
            parts.append(self.to_images(some).cpu())
        return torch.cat(parts)

    # -- the edited model as an ordinary checkpoint ------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, edit: Edit) -> None:
        """Write the model with the edit merged into its weights, for plain `transformers`; the model itself stays.

        Maps are folded first. Raises ValueError when a map cannot be folded, when folding needs a bias for which a
        layer has no place, or when an edit is in force; then nothing is written.
        """
        self.require_unedited()
        folded = edit.fold(self)
        require_none(folded.maps)
        self.bias_room(name for name in folded.deltas if self.parameter(name) is None)
        with replaced_folder(Path(folder)) as temporary, folded.applied(self):
            self.module.save_pretrained(temporary)
            self.processor.save_pretrained(temporary)


class _PromptHooks:
    """A map of the prompt's tokens alone: the rows of a call of the decoder that the table of words has just given."""

    def __init__(self, module: nn.Module, site: Site, concept_map: ConceptMap) -> None:
        self._map, self._count = concept_map, 0
        self._given: Tensor | None = None
        self._handles = [
            module.get_submodule(EMBEDDING).register_forward_hook(self._remember),
            module.get_submodule(DECODER).register_forward_pre_hook(self._begin, with_kwargs=True),
            hook(module, site, self._change),
        ]

    def _remember(self, _: nn.Module, __: Any, rows: Tensor) -> None:
        self._given = rows

    def _begin(self, _: nn.Module, __: Any, asked: dict[str, Any]) -> None:
        given, read = self._given, asked.get("inputs_embeds")
        self._given, self._count = None, 0
        if given is not None and read is not None and torch.equal(read[:, : given.shape[1]], given):
            self._count = given.shape[1]

    def _change(self, x: Tensor) -> Tensor:
        return torch.cat([self._map(x[:, : self._count]), x[:, self._count :]], 1) if self._count else x

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _drawn(logits: Tensor, draws: Sequence[torch.Generator], temperature: float) -> Tensor:
    """One token for each row (n, codes): the largest of logits / temperature + Gumbel noise from the row's own draw.

    Raises FloatingPointError when a logit is NaN or infinite.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("The predictions of the model are not finite.")
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.stack([torch.rand(logits.shape[1], generator=draw) for draw in draws])
    noise = -(-uniform.clamp(min=1e-20).log()).log()
    return (logits / temperature + noise.to(logits.device)).argmax(-1)
