"""`DiffusionModel`: a thin wrapper around any text-to-image pipeline of `diffusers` whose denoiser is in the table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conceptx.edit import Edit, Fingerprint
from conceptx.edit.fold import require_none
from conceptx.geometry import ActivationMap, ConceptMap
from conceptx.models.diffusion_sites import Denoiser, denoiser_of, hook_prompts, text_encoders, text_sites
from conceptx.models.encoded import Prompts
from conceptx.models.modes import evaluating
from conceptx.models.passes import hook, seen
from conceptx.models.schedule import Schedule, as_timesteps
from conceptx.models.sites import Site
from conceptx.models.wrapper import Wrapper, edits_on
from conceptx.progress import track
from conceptx.store import replaced_folder
from conceptx.words import whole_words

EMBEDDED_GUIDANCE = 3.5  # what FluxPipeline gives a guidance-distilled denoiser
ENCODED_AT_ONCE = 64  # prompts in one call of the text encoders
T5_TOKENIZERS = ("tokenizer_3", "tokenizer_2")  # SD 3, FLUX


class DiffusionModel(Wrapper):
    """The user's own pipeline, with named sites, parameters by component and one convention for tokens and noise.

    pipeline:      the `diffusers` pipeline; it is never copied or replaced.
    denoiser:      its U-Net or transformer.  denoiser_name: "unet" or "transformer".
    module:        denoiser and text encoders under one roof; parameters are named "unet.…", "text_encoder.…".
    guidance:      strength of the guidance where `generate` is given none (None: the pipeline's own default).
    applied:       the edits in force, the latest last.

    Raises ValueError when the denoiser or a text encoder is unknown, when nothing reads the text, when the pipeline
    needs an image, when it is quantised, or when LoRA layers are loaded into it.
    """

    def __init__(self, pipeline: Any, *, guidance: float | None = None) -> None:
        self.architecture: Denoiser = denoiser_of(pipeline)
        self._schedule = Schedule.of(pipeline.scheduler)
        self.pipeline = pipeline
        self.guidance = guidance
        self.denoiser_name = self.architecture.component
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.module = nn.ModuleDict({self.denoiser_name: self.denoiser, **text_encoders(pipeline)})
        _refuse_changed(self.module)
        self._sites = {s.name: s for s in text_sites(self.architecture, self.denoiser, text_encoders(pipeline))}
        self.applied = edits_on(self.denoiser)

    # -- what is there -----------------------------------------------------------------------------------------

    @property
    def sites(self) -> Mapping[str, Site]:
        """Where the denoiser reads the text, and the blocks of the text encoders."""
        return self._sites

    @property
    def default_sites(self) -> tuple[str, ...]:
        """The blocks of the text encoders."""
        return tuple(name for name, site in self.sites.items() if site.side == "output")

    @property
    def components(self) -> dict[str, tuple[str, nn.Module]]:
        """What the fingerprint is taken of, each with its kind."""
        return {name: (type(part).__name__, part) for name, part in self.module.items()}

    @property
    def text_fingerprint(self) -> Fingerprint:
        """Of the text encoders alone: what an edit of the token rows is made for, whatever denoiser reads them."""
        return self.fingerprint.only(*text_encoders(self.pipeline))

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers that read the token rows, with the component before their path."""
        return self.readers("text")

    def width(self, site: str) -> int:
        """The dimension of the rows at a site."""
        if self.site(site).side == "output":
            return int(getattr(self.pipeline, site.partition(".")[0]).config.hidden_size)
        if width := self._read_width(site):
            return width
        config = self.denoiser.config  # the pooled vector of SDXL stands beside six embedded numbers
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)

    @property
    def context(self) -> int:
        """How many tokens of a prompt are counted at most."""
        return int(getattr(self.pipeline, self.architecture.tokenizer).model_max_length)

    @property
    def schedule(self) -> Schedule:
        """The noise levels of the pipeline's scheduler, which the user may have changed."""
        if self._schedule.config != dict(self.pipeline.scheduler.config):
            self._schedule = Schedule.of(self.pipeline.scheduler)
        return self._schedule

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def install(self, site: str, concept_map: ActivationMap) -> Any:
        """Pass what the denoiser reads, or a block of a text encoder gives, through the map until `.remove()`.

        Raises ValueError for a map of whole prompts at a site outside the text encoders.
        """
        found, here = self.site(site), concept_map.to(self.device)
        if isinstance(here, ConceptMap):
            return hook(self.module, found, here)
        _, tokenizer = self._reader(site)
        return hook_prompts(self.module, found, tokenizer.eos_token_id, here)

    # -- inside the text encoders ------------------------------------------------------------------------------

    def record(
        self, prompts: Sequence[str], sites: Sequence[str], *, batch_size: int = ENCODED_AT_ONCE
    ) -> Iterator[dict[str, Tensor]]:
        """Encode the prompts as the pipeline does, a batch at a time; yields {site: (tokens, d)} in their order.

        The tokens of a prompt are those that its text encoder reads up to and with the end-of-text token; padding is
        left out. The pass ends at the last of the sites.
        Raises ValueError for an empty list, a site outside the text encoders, and a prompt that would be cut.
        """
        lengths = {name: self.lengths(prompts, name) for name in sites}
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            states = self._passing(prompts[part], sites)
            yield {
                name: torch.cat([x[:n] for x, n in zip(states[name], lengths[name][part], strict=True)])
                for name in sites
            }

    def lengths(self, prompts: Sequence[str], site: str) -> list[int]:
        """How many tokens `record` gives of each prompt at a site. Raises ValueError as it does."""
        if not len(prompts):
            raise ValueError("No text was given.")
        name, _ = self._reader(site)
        return [next(count for t, count, _ in self._lengths(text) if t == name) for text in prompts]

    def begins(self, site: str) -> int:
        """How many tokens of its own the tokenizer behind a site puts before a prompt (CLIP: one, T5: none)."""
        return len(self._reader(site)[1]("").input_ids) - 1

    def _reader(self, site: str) -> tuple[str, Any]:
        """(name, tokenizer) of the text encoder that a site lies in."""
        if self.site(site).side != "output":
            inside = [name for name, found in self.sites.items() if found.side == "output"]
            raise ValueError(f"The site {site} is not inside a text encoder; these are: {', '.join(inside)}.")
        name = site.partition(".")[0].replace("text_encoder", "tokenizer")
        return name, getattr(self.pipeline, name)

    @torch.no_grad()
    def _passing(self, prompts: Sequence[str], sites: Sequence[str]) -> dict[str, Tensor]:
        """{site: (n, tokens, d)} while prompts are encoded, without padding that they do not need (see `encode`)."""
        longest = max(count for text in prompts for _, count, _ in self._lengths(text))
        short = self._padded_to(longest) if self._causal else nullcontext()
        with evaluating(self.module), short:
            places = [self.site(name) for name in sites]
            return seen(self.module, places, lambda: self._encoded(list(prompts), unconditional=False))

    # -- prompts -----------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], *, differentiable: bool = False, trimmed: bool = False) -> Prompts:
        """The prompts as the pipeline itself encodes them, in the pipeline's dtype, on its device.

        differentiable: keep the graph back to the text encoder (for attacks that learn a token).
        trimmed: encode no more padding than the prompts need, where all text encoders are causal (CLIP): the rows up to
                 each end-of-text token are the same, since no row there depends on a later one. Rows after it, which
                 padding would fill, are zero, and there are only as many rows as the longest prompt has.
        Raises ValueError for an empty list, and for a prompt that the tokenizer would cut.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"encode takes a list of at least one prompt, got {prompts!r}.")
        spans = [self._span(text) for text in prompts]
        with torch.set_grad_enabled(differentiable), evaluating(self.module):
            if trimmed and self._causal:
                states, pooled = self._encoded_short(prompts)
            else:
                batches = [list(prompts[i : i + ENCODED_AT_ONCE]) for i in range(0, len(prompts), ENCODED_AT_ONCE)]
                states, pooled = _joined([self._encoded(batch, unconditional=False)[0] for batch in batches])
        first, end = torch.tensor(spans, device=self.device).T
        return Prompts(tuple(prompts), states, pooled, first, end)

    @property
    def _causal(self) -> bool:
        """Whether no row of a prompt depends on a later one, and the pipeline pads to what the tokenizer holds."""
        encoders = text_encoders(self.pipeline).values()
        return self.denoiser_name == "unet" and all(type(e).__name__.startswith("CLIPText") for e in encoders)

    def _encoded_short(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Short prompts with short ones; rows beyond a batch's own length are zero."""
        lengths = [max(count for _, count, _ in self._lengths(text)) for text in prompts]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        parts = []
        for start in range(0, len(order), ENCODED_AT_ONCE):
            batch = order[start : start + ENCODED_AT_ONCE]
            with self._padded_to(lengths[batch[-1]]):
                states, pooled = self._encoded([prompts[i] for i in batch], unconditional=False)[0]
            parts.append((nn.functional.pad(states, (0, 0, 0, max(lengths) - states.shape[1])), pooled))
        back = torch.tensor(order).argsort()
        states, pooled = _joined(parts)
        return states[back], None if pooled is None else pooled[back]

    @contextmanager
    def _padded_to(self, length: int) -> Iterator[None]:
        """The tokenizers hold no more than this many tokens for the length of a block."""
        tokenizers = [tokenizer for _, tokenizer, _ in self._tokenizers()]
        before = [tokenizer.model_max_length for tokenizer in tokenizers]
        try:
            for tokenizer in tokenizers:
                tokenizer.model_max_length = length
            yield
        finally:
            for tokenizer, held in zip(tokenizers, before, strict=True):
                tokenizer.model_max_length = held

    def unconditional(self, count: int = 1) -> Prompts:
        """What the pipeline takes for no prompt under guidance: the empty prompt, or zeros (SDXL)."""
        with torch.no_grad(), evaluating(self.module):
            _, (states, pooled) = self._encoded([""], unconditional=True)
        first, end = torch.tensor([self._span("")], device=states.device).T
        return Prompts(("",), states, pooled, first, end).repeat(count)

    def _encoded(self, prompts: list[str], *, unconditional: bool) -> tuple[Any, Any]:
        """((states, pooled), (states, pooled) of no prompt)."""
        options = {"prompt": prompts, "device": self.device, "num_images_per_prompt": 1, **self._length}
        if self.architecture.packed:  # FLUX knows no guidance of its own
            states, pooled, _ = self.pipeline.encode_prompt(prompt_2=None, **options)
            return (states, pooled), (states, pooled)
        if self.architecture.pooled:
            options |= {"prompt_2": None} | ({"prompt_3": None} if self._has("encode_prompt", "prompt_3") else {})
        found = self.pipeline.encode_prompt(do_classifier_free_guidance=unconditional, **options)
        states, negative, pooled, negative_pooled = (*found, None, None)[:4]
        return (states, pooled), (negative, negative_pooled)

    @property
    def _length(self) -> dict[str, int]:
        """How many tokens a T5 reads, where a pipeline asks for it: its default, or what the tokenizer holds."""
        if not self._has("encode_prompt", "max_sequence_length"):
            return {}
        default = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        tokenizers = [part for name in T5_TOKENIZERS if (part := getattr(self.pipeline, name, None)) is not None]
        return {"max_sequence_length": min([default, *(t.model_max_length for t in tokenizers[:1])])}

    def _has(self, method: str, argument: str) -> bool:
        return argument in inspect.signature(getattr(self.pipeline, method)).parameters

    def _tokenizers(self) -> Iterator[tuple[str, Any, int]]:
        """(name, tokenizer, how many tokens its encoder reads)"""
        for name, encoder in text_encoders(self.pipeline).items():
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            t5 = type(encoder).__name__ == "T5EncoderModel"
            fits = self._length["max_sequence_length"] if t5 else tokenizer.model_max_length
            yield name.replace("text_encoder", "tokenizer"), tokenizer, fits

    def _lengths(self, prompt: str) -> Iterator[tuple[str, int, Any]]:
        """(name of the tokenizer, number of tokens, tokenizer). Raises ValueError when a tokenizer would cut it."""
        for name, tokenizer, fits in self._tokenizers():
            count = len(tokenizer(self._converted(prompt, tokenizer), verbose=False).input_ids)
            if count > fits:
                raise ValueError(
                    f"The prompt {prompt[:40]!r}… has {count} tokens with its special ones, the {name} keeps {fits}."
                )
            yield name, count, tokenizer

    def _span(self, prompt: str) -> tuple[int, int]:
        """(first, end) of a prompt. Raises ValueError when a tokenizer would cut it."""
        found = {
            name: (len(tokenizer("").input_ids) - 1, count - 1) for name, count, tokenizer in self._lengths(prompt)
        }
        return found[self.architecture.tokenizer]

    def require_whole(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt that a tokenizer would cut."""
        for prompt in prompts:
            self._span(prompt)

    def _converted(self, prompt: str, tokenizer: Any) -> str:
        """With every learnt token that has several vectors spelt out, as the pipeline does it."""
        convert = getattr(self.pipeline, "maybe_convert_prompt", None)
        return convert(prompt, tokenizer) if convert else prompt

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens by which rows are counted, with the special ones, without padding."""
        tokenizer = getattr(self.pipeline, self.architecture.tokenizer)
        return tokenizer(self._converted(prompt, tokenizer)).input_ids

    def subject_end(self, prompt: str, name: str) -> int:
        """The row of the last token of `name` in the prompt (of its last mention).

        Upper and lower case are the same. Raises ValueError when the prompt does not hold the name as whole words.
        """
        tokenizer = getattr(self.pipeline, self.architecture.tokenizer)
        text, wanted = self._converted(prompt, tokenizer), self._converted(name, tokenizer)
        found = list(whole_words(wanted).finditer(text))
        if not found:
            raise ValueError(f"The prompt {prompt!r} does not hold {name!r} as whole words.")
        first, end = self._span(prompt)
        offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
        start, stop = found[-1].span()
        return max(row for row in range(first, end) if offsets[row][0] < stop and offsets[row][1] > start)

    # -- noise -------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent at the pipeline's own image size."""
        side = getattr(self.pipeline, "default_sample_size", None) or self.denoiser.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        channels = self.denoiser.config.in_channels
        return (channels // 4 if self.architecture.packed else channels, int(height), int(width))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Pure noise (n, c, h, w) in float32: number i from seeds[i] alone, as `generate` begins with it."""
        drawn = [
            torch.randn((1, *self.latent_shape), generator=generator, dtype=self.dtype) for generator in _random(seeds)
        ]
        return torch.cat(drawn).to(self.device).float()

    def predict(
        self, latents: Tensor, timestep: Tensor | float, prompts: Prompts, *, guidance: float | None = None
    ) -> Tensor:
        """The noise in the latents (n, c, h, w), float32, whatever the denoiser itself predicts.

        timestep: (n,) or one number, in the scheduler's own unit.
        prompts:  n of them, or one for all.
        guidance: g in e0 + g (e - e0), with e0 the noise predicted without a prompt (None: e).
        Differentiable; nothing here decides on gradients. At the first timestep of a flow (pure noise) the noise is the
        latent itself, whatever the denoiser says.
        """
        times = as_timesteps(timestep, len(latents), latents.device)
        output = self._output(latents, times, self._guided(prompts, len(latents), guidance), guidance)
        return self.schedule.split(output, latents.float(), times)[1]

    def _guided(self, prompts: Prompts, count: int, guidance: float | None) -> Prompts:
        """One prompt a latent, and with guidance as many empty ones before them."""
        conditional = prompts.repeat(count) if len(prompts) == 1 else prompts
        return conditional if guidance is None else self.unconditional(count) + conditional

    def _output(self, latents: Tensor, times: Tensor, prompts: Prompts, guidance: float | None) -> Tensor:
        """What the denoiser itself predicts, in float32, with guidance already in it."""
        if guidance is None:
            return self._call(latents, times, prompts)
        without, given = self._call(torch.cat([latents] * 2), torch.cat([times] * 2), prompts).chunk(2)
        return without + guidance * (given - without)

    def _call(self, latents: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        latents, states = latents.to(self.dtype), prompts.states.to(self.dtype)
        pooled = None if prompts.pooled is None else prompts.pooled.to(self.dtype)
        if self.architecture.packed:
            return self._call_packed(latents, times, states, pooled).float()
        given: dict[str, Any] = {"encoder_hidden_states": states, "timestep": times, "return_dict": False}
        if self.denoiser_name == "transformer":
            given |= {"hidden_states": latents, "pooled_projections": pooled}
        else:
            given |= {"sample": latents, "added_cond_kwargs": None if pooled is None else self._added(pooled)}
        return self.denoiser(**given)[0].float()

    def _added(self, pooled: Tensor) -> dict[str, Tensor]:
        """What SDXL is told beside the text: sizes before and after cropping, here those of a whole image."""
        size = self._image_size()
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return {"text_embeds": pooled, "time_ids": ids.to(pooled.device).expand(len(pooled), -1)}

    def _call_packed(self, latents: Tensor, times: Tensor, states: Tensor, pooled: Tensor | None) -> Tensor:
        n, channels, height, width = latents.shape
        pipeline = self.pipeline
        guidance = torch.full((n,), EMBEDDED_GUIDANCE, device=latents.device)
        output = self.denoiser(
            hidden_states=pipeline._pack_latents(latents, n, channels, height, width),
            timestep=times.to(latents.dtype) / 1000,
            guidance=guidance if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(n, height // 2, width // 2, latents.device, latents.dtype),
            return_dict=False,
        )[0]
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(output, height * scale, width * scale, scale)

    @torch.no_grad()
    def rollout(
        self, prompts: Prompts, *, steps: int, stop: Sequence[int] | int, seeds: Sequence[int], guidance: float
    ) -> tuple[Tensor, Tensor]:
        """Latents on their way from pure noise to an image, after `stop` of `steps` DDIM (flow: Euler) steps.

        prompts: n of them, or one for all n seeds.  stop: one number or one for each latent, in 0 .. steps - 1.
        Returns latents (n, c, h, w) in float32 and timesteps (n,): each latent has the noise level of its timestep,
        since the timestep is the one that its last step went to. Stopped at 0 it is pure noise, which a sampler
        takes for the level of its first timestep. Raises ValueError for a `stop` outside the range.
        """
        stops = torch.as_tensor(stop).reshape(-1).expand(len(seeds)).tolist() if isinstance(stop, int) else list(stop)
        if len(stops) != len(seeds) or not all(0 <= s < steps for s in stops):
            raise ValueError(f"stop must be in 0..{steps - 1}, one for each of the {len(seeds)} seeds, got {stops}.")
        times = self._timesteps(steps).to(self.device)
        latents, reached = self.noise(seeds), times[:1].repeat(len(seeds))
        strength = None if guidance == 1 else guidance
        both = self._guided(prompts, len(seeds), strength)
        with evaluating(self.module):
            for here, there in zip(range(max(stops)), range(1, steps), strict=False):
                on = [row for row, last in enumerate(stops) if last > here]
                rows = on if strength is None else [*on, *(row + len(seeds) for row in on)]
                output = self._output(latents[on], reached[on], both.select(rows), strength)
                latents[on] = self.schedule.step(output, latents[on], reached[on], times[there].expand(len(on)))
                reached[on] = times[there]
        return latents, reached

    def walk(
        self, prompts: Prompts, *, steps: int, seeds: Sequence[int], guidance: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Every stop of one `rollout`, 0 .. steps - 1: latents (n, c, h, w) in float32 and their timestep, one number.

        Nothing beyond the stop that was last asked for is computed.
        """
        times, latents = self._timesteps(steps).to(self.device), self.noise(seeds)
        strength = None if guidance == 1 else guidance
        both = self._guided(prompts, len(seeds), strength)
        for here, there in pairwise(times):
            yield latents, here
            rows = (here.repeat(len(seeds)), there.repeat(len(seeds)))
            with evaluating(self.module):
                output = self._output(latents, rows[0], both, strength)
            latents = self.schedule.step(output, latents, *rows)
        yield latents, times[-1]

    def _timesteps(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape
        patch = 2 if self.architecture.packed else getattr(self.denoiser.config, "patch_size", None) or 1
        tokens = (height // patch) * (width // patch)
        return self.schedule.timesteps(steps, tokens, even=self.architecture.packed)

    # -- images ------------------------------------------------------------------------------------------------

    def _image_size(self) -> tuple[int, int]:
        _, height, width = self.latent_shape
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Latents (n, c, h, w), float32, of images (n, 3, height, width) in [0, 1]: the mean of the encoder."""
        vae = self.pipeline.vae
        encoded = vae.encode(images.to(self.device, vae.dtype) * 2 - 1).latent_dist.mode().float()
        shift, scale = _latent_scale(vae.config, encoded.device)
        return (encoded - shift) * scale

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, height, width) in [0, 1], float32 on the CPU, of latents."""
        vae = self.pipeline.vae
        shift, scale = _latent_scale(vae.config, latents.device)
        decoded = vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> Tensor:
        """Images (n, 3, height, width) in [0, 1] on the CPU, by the pipeline itself.

        Image i comes from prompts[i] and seeds[i] alone, whatever stands beside it. Guidance: as the pipeline means it
        (default: the model's, else the pipeline's). Options go to the pipeline, a list of n is shared out among the
        prompts; generation arguments of the edits in force are added.
        Raises ValueError when seeds and prompts differ in number, or the tokenizer would cut a prompt,
        FloatingPointError when a picture is NaN.
        """
        if isinstance(prompts, str) or not len(prompts) or len(prompts) != len(seeds):
            raise ValueError(f"generate takes a list of prompts and as many seeds, got {prompts!r} and {seeds!r}.")
        self.require_whole(prompts)
        strength = self.guidance if guidance is None else guidance
        asked = {key: value for handle in self.applied for key, value in handle.edit.generation.items()}
        settings = {
            "num_inference_steps": steps,
            **({} if strength is None else {"guidance_scale": strength}),
            **self._length,
            **asked,
            **options,
        }
        parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
        with evaluating(self.module), _quiet(self.pipeline):
            return torch.cat([self._images(prompts, seeds, part, settings) for part in track(parts, "images")])

    def _images(self, prompts: Sequence[str], seeds: Sequence[int], part: slice, settings: Mapping[str, Any]) -> Tensor:
        """One batch through the pipeline, each image from its own random numbers."""
        texts = list(prompts[part])
        mine = {key: _share(key, value, part, len(prompts)) for key, value in settings.items()}
        images = self.pipeline(prompt=texts, generator=_random(seeds[part]), output_type="pt", **mine).images
        if not images.isfinite().all():
            raise FloatingPointError("The predictions of the model are not finite.")
        return images.detach().float().cpu()

    # -- the edited pipeline as an ordinary folder -------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, edit: Edit) -> None:
        """Write the pipeline with the edit merged into its weights, for plain `diffusers`; the pipeline itself stays.

        Maps are folded first; generation arguments of the edit are no weights and are left out. Raises ValueError when
        a map cannot be folded, when folding needs a bias for which a layer has no place, or when an edit is in force;
        then nothing is written.
        """
        self.require_unedited()
        folded = edit.fold(self)
        require_none(folded.maps)
        self.bias_room(name for name in folded.deltas if self.parameter(name) is None)
        with replaced_folder(Path(folder)) as temporary, folded.applied(self):
            self.pipeline.save_pretrained(temporary)


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    states, pooled = zip(*parts, strict=True)
    return torch.cat(states), None if pooled[0] is None else torch.cat(pooled)


def _share(key: str, value: Any, part: slice, count: int) -> Any:
    """The part of an option that belongs to a batch: pipelines want one negative prompt a prompt."""
    if isinstance(value, str) and key.startswith("negative_prompt"):
        value = [value] * count
    return value[part] if isinstance(value, list) and len(value) == count else value


def _random(seeds: Sequence[int]) -> list[torch.Generator]:
    """On the CPU, so that a seed means the same everywhere."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _latent_scale(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale) with latent = (encoded - shift) * scale, one for each channel or one for all."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = torch.tensor(config.scaling_factor, device=device)
    if mean is None or std is None:
        return torch.tensor(getattr(config, "shift_factor", None) or 0.0, device=device), scale
    shift, spread = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return shift, scale / spread


def _refuse_changed(module: nn.Module) -> None:
    if any(getattr(getattr(part, "config", None), "quantization_config", None) for part in module.children()):
        raise ValueError("The pipeline is quantised; load it in float32, bfloat16 or float16 to edit it.")
    if any(".lora_" in name for name, _ in module.named_parameters()):
        raise ValueError("LoRA layers are loaded into the pipeline; fuse them and unload them (unload_lora_weights).")


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar for the length of a block."""
    had, before = hasattr(pipeline, "_progress_bar_config"), getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if had:
            pipeline._progress_bar_config = before
        else:
            del pipeline._progress_bar_config
