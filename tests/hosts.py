"""Tiny random models of every family in the tables of architectures, with tokenizers trained in memory."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from conceptx.models import ARImageModel, DiffusionModel, LanguageModel, Model, wrap

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


def state(model: Model) -> dict[str, torch.Tensor]:
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


# -- text-to-image pipelines -------------------------------------------------------------------------------------------

PIPELINES = ("sd1", "sd2", "sdxl", "sd3", "flux")
CLIP_TOKENS, T5_TOKENS = 24, 28  # how many a text encoder reads


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A BPE as CLIP has it; words it has not seen have several tokens. SD 1 pads with the end token, SD 2 with "!"."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer, raw.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator([*METALS, *GARDEN], trainer)
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=raw.get_vocab(), merges=merges, model_max_length=CLIP_TOKENS, pad_token=pad)


@cache
def t5_tokenizer() -> Any:
    """Pieces as SentencePiece has them: the words of the texts, and letters for all others."""
    from transformers import T5Tokenizer

    words = sorted({word.strip(",") for text in [*METALS, *GARDEN] for word in text.split()})
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyz,."})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*special, *((f"▁{word}", -4.0) for word in words), *((letter, -8.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def _clip(width: int, pad: str = "<|endoftext|>", *, projected: bool = False) -> tuple[Any, Any]:
    """(text encoder, tokenizer)"""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens = clip_tokenizer(pad)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), tokens


def _t5(width: int) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes)), t5_tokenizer()


def _vae(channels: int, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **more,
    )


def _unet(width: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": width,
    }
    return UNet2DConditionModel(**{**settings, **more})


def _ddim(**more: Any) -> Any:
    """As in the configurations of SD 1 and 2."""
    from diffusers import DDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **betas, **more)


def _sd1() -> Any:
    return _stable_diffusion(_clip(32), _unet(32), _ddim())


def _sd2() -> Any:
    heads = {"attention_head_dim": [2, 4], "use_linear_projection": True}
    return _stable_diffusion(_clip(32, "!"), _unet(32, **heads), _ddim(prediction_type="v_prediction"))


def _stable_diffusion(clip: tuple[Any, Any], unet: Any, scheduler: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    parts = {"vae": _vae(4), "text_encoder": clip[0], "tokenizer": clip[1], "unet": unet, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, second = _clip(16), _clip(32, "!", projected=True)
    unet = _unet(
        48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    scheduler = EulerDiscreteScheduler.from_config(dict(_ddim().config), timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        vae=_vae(4, force_upcast=False),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second, third = _clip(16, projected=True), _clip(32, "!", projected=True), _t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        text_encoder_3=third[0],
        tokenizer_3=third[1],
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    first, second = _clip(32), _t5(48)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        vae=_vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipeline.default_sample_size = 8  # else 1024 pixels
    return pipeline


@cache
def _pipeline(kind: str, seed: int) -> Any:
    """Text readers are three times as large as at their start, so that the prompt matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    for name, parameter in wrap(pipeline).module.named_parameters():
        if name.split(".")[-2] in ("to_k", "to_v", "context_embedder") and name.endswith("weight"):
            parameter.data *= 3
    return pipeline


def tiny_pipeline(kind: str = "sd1", seed: int = 0) -> DiffusionModel:
    """A fresh wrapped pipeline of random weights; with the same arguments always the same ones."""
    return wrap(copy.deepcopy(_pipeline(kind, seed)))


def noise(model: DiffusionModel, prompts: list[str]) -> torch.Tensor:
    """The noise that is predicted for each prompt, in latents of its own, late and early in the sampling."""
    latents = torch.cat([model.noise([seed]) for seed in range(len(prompts))])
    with torch.no_grad():
        encoded = model.encode(prompts)
        return torch.stack([model.predict(latents, time, encoded) for time in (100, 600)])


# -- a model that draws token by token ---------------------------------------------------------------------------------


JANUS = "janus"


@cache
def _janus(seed: int) -> tuple[Any, Any]:
    """The testbed's own architecture with random weights; its decoder writes more, so that the prompt matters."""
    from conceptx.testbeds.janus import networks

    tokens = networks.build_tokenizer()
    tokens.model_max_length = 128  # the texts here are longer than captions
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = networks.build_model(tokens)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("language_model" in name or "generation_" in name):
            parameter.data *= 4
    return model, networks.build_processor(tokens)


def tiny_janus(dtype: torch.dtype = torch.float32, seed: int = 0) -> ARImageModel:
    """A fresh wrapped Janus of random weights; with the same arguments always the same ones."""
    module, processor = _janus(seed)
    return wrap(copy.deepcopy(module).to(dtype), processor)


@torch.no_grad()
def scores(model: ARImageModel, prompts: list[str]) -> torch.Tensor:
    """The scores of image tokens after a few fixed ones, for each prompt (alone: padding would round differently)."""
    tokens = torch.arange(0, 60, 5)[None]
    return torch.cat([model.logits(model.predict(model.prompts([text]), tokens)) for text in prompts])


# -- of any sort ----------------------------------------------------------------------------------------------------


def host(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """A fresh language model, pipeline or Janus, by its kind."""
    if kind in KINDS:
        return tiny(kind, dtype, seed)
    if kind == JANUS:
        return tiny_janus(dtype, seed)
    model = tiny_pipeline(kind, seed)
    if dtype != torch.float32:
        model.pipeline.to(dtype)
    return model


def said(model: Model) -> torch.Tensor:
    """What a model makes of a few texts: the logits, the predicted noise, or the scores of image tokens."""
    if isinstance(model, ARImageModel):
        return scores(model, METALS[:2])
    return logits(model) if isinstance(model, LanguageModel) else noise(model, METALS[:2])
