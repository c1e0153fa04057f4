"""The parts of the emoji pipeline, small but real: tokenizer, text encoder, autoencoder, denoiser, and the judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conceptx.testbeds.emoji.vocabulary import OBJECTS, STYLES, every_caption

CONTEXT = 24  # tokens of a caption
WIDTH = 384  # of the text states, which cross-attention reads
LATENT = 8  # rows and columns of a latent
CHANNELS = 4  # of a latent


def build_tokenizer() -> Any:
    """A CLIP byte-level BPE learnt from the captions; no piece is longer than six letters, so that long words split."""
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    like = CLIPTokenizer().backend_tokenizer
    raw = Raw(BPE(end_of_word_suffix="</w>"))
    raw.normalizer, raw.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    endings = [f"{char}</w>" for char in alphabet]
    trainer = BpeTrainer(
        vocab_size=2000,
        initial_alphabet=alphabet,
        special_tokens=endings,  # or else they are numbered in the order of a hash table, by which ties are broken
        end_of_word_suffix="</w>",
        max_token_length=6 + len("</w>"),
        show_progress=False,
    )
    raw.train_from_iterator(every_caption(), trainer)
    merges = [tuple(pair) for pair in _merges(raw)]
    pieces = [*alphabet, *endings, *("".join(pair) for pair in merges)]
    ordered = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocabulary = {piece: number for number, piece in enumerate(ordered)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def _merges(raw: Any) -> list[list[str]]:
    import json

    merges = json.loads(raw.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def build_text_encoder(tokenizer: Any) -> Any:
    """CLIPTextModel: two layers, width 384."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            projection_dim=WIDTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_autoencoder() -> Any:
    """AutoencoderKL: 32 x 32 pictures to 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=LATENT * 4,
        scaling_factor=1.0,
    )


def build_denoiser(*, fine: bool = True) -> Any:
    """UNet2DConditionModel on 8 x 8 latents; it reads the text at 4 x 4 and, when `fine`, at 8 x 8 as well."""
    from diffusers import UNet2DConditionModel

    first = "CrossAttnDownBlock2D" if fine else "DownBlock2D"
    last = "CrossAttnUpBlock2D" if fine else "UpBlock2D"
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=(first, "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", last),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def build_scheduler(prediction: str = "epsilon") -> Any:
    """DDIM on Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (n, 24), padded as the pipeline pads."""
    return tokenizer(list(texts), padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids


class ImageTrunk(nn.Module):
    """Pictures (n, 3, 32, 32) to features (n, width): four convolutions, each halving the side."""

    def __init__(self, width: int, channels: Sequence[int] = (32, 64, 128, 192)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.GELU(), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(channels[-1] * 4, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.layers(images * 2 - 1).flatten(1))


class ImageEncoder(nn.Module):
    """Pictures to the space of the text encoder's pooled output: the image side of the small CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ImageTrunk(WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.6))  # log of the inverse temperature

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.trunk(images), dim=-1)


class Judge(nn.Module):
    """One network, four heads: object (the last class is "none of these"), style, watermark, unsafe."""

    def __init__(self, features: int = 160) -> None:
        super().__init__()
        self.trunk = ImageTrunk(features)
        self.heads = nn.ModuleDict(
            {
                "objects": nn.Linear(features, len(OBJECTS) + 1),
                "styles": nn.Linear(features, len(STYLES)),
                "watermark": nn.Linear(features, 1),
                "unsafe": nn.Linear(features, 1),
            }
        )

    def features(self, images: Tensor) -> Tensor:
        return F.gelu(self.trunk(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}
