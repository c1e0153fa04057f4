"""The parts of the small Janus: an ordinary `JanusForConditionalGeneration`, its tokenizer and its processor."""

from __future__ import annotations

from typing import Any

from conceptx.testbeds.janus import GUIDANCE, TEMPERATURE
from conceptx.testbeds.janus.vocabulary import every_caption

SIDE = 8  # rows and columns of image tokens
TOKENS = SIDE * SIDE
CODES = 512  # of the codebook
WIDTH = 192  # of the decoder
CONTEXT = 32  # tokens of a prompt, at most
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
IMAGE, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL = (PAD, BOS, EOS, IMAGE, BEGIN, END, USER, ASSISTANT)
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|User|>"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


def build_tokenizer() -> Any:
    """A byte-level BPE learnt from the captions, which puts the begin-of-text token first and pads on the left."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(BPE())
    raw.normalizer, raw.pre_tokenizer, raw.decoder = Lowercase(), ByteLevel(add_prefix_space=True), Decoder()
    trainer = BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(every_caption(), trainer)
    raw.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_processor(tokenizer: Any) -> Any:
    """A `JanusProcessor` of 32 x 32 pictures."""
    from transformers import JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    pictures = JanusImageProcessorPil(
        size={"height": 4 * SIDE, "width": 4 * SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=4
    )
    return JanusProcessor(pictures, tokenizer, chat_template=TEMPLATE, num_image_tokens=TOKENS)


def build_model(tokenizer: Any) -> Any:
    """`JanusForConditionalGeneration`: a six-layer decoder, a quantiser of 64 tokens a picture, a vision tower that
    nothing has trained."""
    from transformers import (
        GenerationConfig,
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT + TOKENS,
        tie_word_embeddings=True,
        **special,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2.0,
        image_size=4 * SIDE,
        patch_size=4,
        projection_dim=WIDTH,
        num_image_tokens=TOKENS,
    )
    quantiser = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        num_patches=SIDE,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=quantiser,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    model = JanusForConditionalGeneration(config)
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    # a configuration that the class made itself is not saved with the model
    model.generation_config = GenerationConfig(
        **special,
        do_sample=True,
        guidance_scale=GUIDANCE,
        temperature=TEMPERATURE,
        top_k=0,  # all codes
        generation_kwargs={"boi_token_id": begin},
    )
    return model.eval()
