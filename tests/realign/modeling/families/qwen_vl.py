"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, positions in three dimensions."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from tests.realign.modeling.families.family import (
    TEXT,
    WIDTH,
    Family,
    build,
    make_tokenizer,
    published_template,
    token_ids,
    with_videos,
)


def make_qwen_tokenizer(**named: str) -> Any:
    """Qwen2's special tokens, no beginning of sequence."""
    return make_tokenizer(
        "<|im_start|>", "<|vision_start|>", "<|vision_end|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        named=named or {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )  # fmt: skip


def _processor(kind: type, template: str, patch_size: int) -> Any:
    merged = (2 * patch_size) ** 2  # pixels a token
    return with_videos(
        kind,
        Qwen2VLImageProcessorPil(
            patch_size=patch_size, size={"shortest_edge": 4 * merged, "longest_edge": 9 * merged}
        ),
        make_qwen_tokenizer(),
        f"{'Qwen3' if kind is Qwen3VLProcessor else 'Qwen2'}VLVideoProcessor",
        chat_template=published_template(template),
    )


def _config(
    kind: type, processor: Any, vision: dict[str, Any], sections: list[int], **text: Any
) -> Any:
    tokenizer = processor.tokenizer
    return kind(
        text_config={
            **TEXT,
            **token_ids(tokenizer),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": sections,
            },
            **text,
        },
        vision_config={"depth": 2, "num_heads": 2, **vision},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip


def qwen2_vl(**text: Any) -> Family:
    """Qwen2-VL."""
    processor = _processor(Qwen2VLProcessor, "qwen2_5_vl", 14)
    vision = {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = _config(Qwen2VLConfig, processor, vision, [1, 1, 2], **text)
    return build(Qwen2VLForConditionalGeneration, config, processor)


def qwen2_vl_sliding() -> Family:
    """Qwen2-VL whose second layer has windows shorter than a row."""
    return qwen2_vl(use_sliding_window=True, sliding_window=12, max_window_layers=1)


def qwen2_5_vl() -> Family:
    """Qwen2.5-VL: windows in the vision tower too."""
    processor = _processor(Qwen2_5_VLProcessor, "qwen2_5_vl", 14)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    config = _config(Qwen2_5_VLConfig, processor, vision, [1, 1, 2])
    return build(Qwen2_5_VLForConditionalGeneration, config, processor)


def qwen3_vl() -> Family:
    """Qwen3-VL: vision features of a middle layer are added to the text model's first layers."""
    processor = _processor(Qwen3VLProcessor, "qwen3_vl", 16)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": WIDTH,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = _config(Qwen3VLConfig, processor, vision, [2, 1, 1])
    return build(Qwen3VLForConditionalGeneration, config, processor)
