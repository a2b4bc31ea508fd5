"""Gemma-3, whose image tokens see each other, and PaliGemma, whose whole prompt does."""

from __future__ import annotations

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from realign.modeling.families import CHAT_TEMPLATES
from tests.realign.modeling.families.family import (
    TEXT,
    VISION,
    WIDTH,
    Family,
    build,
    make_tokenizer,
    published_template,
    token_ids,
)

SIDE = 56
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
SIGLIP = SiglipVisionConfig(**{**VISION, "image_size": SIDE}, vision_use_head=False)


def gemma3() -> Family:
    """Gemma-3: layers with windows shorter than a row, and one without."""
    tokenizer = make_tokenizer(
        "<start_of_turn>", "<end_of_turn>", bos="<bos>", adds_bos=True, eos_token="<eos>",
        pad_token="<pad>",
        named={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(**SQUARE),
        tokenizer,
        chat_template=published_template("gemma3"),
        image_seq_length=4,
    )
    text = Gemma3TextConfig(
        **TEXT, **token_ids(tokenizer), query_pre_attn_scalar=8, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return build(Gemma3ForConditionalGeneration, config, processor)


def _paligemma(text: type, **options: object) -> Family:
    tokenizer = make_tokenizer(
        bos="<bos>", adds_bos=True, eos_token="<eos>", pad_token="<pad>",
        named={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = SiglipImageProcessorPil(**SQUARE)
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATES["PaliGemmaProcessor"]
    )
    config = PaliGemmaConfig(
        text_config=text(**TEXT, **token_ids(tokenizer), **options),
        vision_config=SIGLIP,
        image_token_index=tokenizer.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return build(PaliGemmaForConditionalGeneration, config, processor)


def paligemma() -> Family:
    """PaliGemma on Gemma."""
    return _paligemma(GemmaConfig)


def paligemma2() -> Family:
    """PaliGemma 2 on Gemma-2: softcaps, and windows longer than any row, as published."""
    return _paligemma(Gemma2Config, query_pre_attn_scalar=8, sliding_window=1024)
