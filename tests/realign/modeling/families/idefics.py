"""Idefics3 and SmolVLM: tiles with row and column tokens, a pixel mask."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from tests.realign.modeling.families.family import (
    TEXT,
    VISION,
    Family,
    build,
    make_tokenizer,
    published_template,
    token_ids,
    with_videos,
)

SIDE = 56  # 16 patches, a quarter of them after the pixel shuffle
TILES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
# it spells the number of frames of a video and nothing else
if processing_smolvlm.num2words is None:
    processing_smolvlm.num2words = str


def _tokenizer(bos: str) -> Any:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    return make_tokenizer(
        "<fake_token_around_image>", "<global-img>", *places, bos=bos,
        eos_token="<end_of_utterance>", pad_token="<pad>",
        named={
            "image_token": "<image>",
            # SmolVLM asks the tokenizer for these, Idefics3 knows them
            "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip


def _config(kind: type, tokenizer: Any) -> Any:
    return kind(
        vision_config={**VISION, "image_size": SIDE},
        text_config=LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )


def idefics3() -> Family:
    """Idefics3."""
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**TILES),
        _tokenizer("<|begin_of_text|>"),
        image_seq_len=4,
        chat_template=published_template("idefics3"),
    )
    config = _config(Idefics3Config, processor.tokenizer)
    return build(Idefics3ForConditionalGeneration, config, processor)


def smolvlm() -> Family:
    """SmolVLM2."""
    processor = with_videos(
        SmolVLMProcessor,
        SmolVLMImageProcessorPil(**TILES),
        _tokenizer("<|im_start|>"),
        "SmolVLMVideoProcessor",
        image_seq_len=4,
        chat_template=published_template("smolvlm"),
    )
    config = _config(SmolVLMConfig, processor.tokenizer)
    return build(SmolVLMForConditionalGeneration, config, processor)
