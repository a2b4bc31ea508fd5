"""Families whose answers cannot share a prefix."""

from __future__ import annotations

from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
)

from tests.realign.modeling.families.family import (
    TEXT,
    WIDTH,
    Family,
    build,
    published_template,
    token_ids,
    with_videos,
)
from tests.realign.modeling.families.qwen_vl import make_qwen_tokenizer


def qwen3_5() -> Family:
    """Qwen3.5: three layers in four carry a state from token to token instead of attending."""
    tokenizer = make_qwen_tokenizer()
    processor = with_videos(
        Qwen3VLProcessor,
        Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": 4 * 32**2, "longest_edge": 9 * 32**2}
        ),
        tokenizer,
        "Qwen3VLVideoProcessor",
        chat_template=published_template("qwen3_vl"),
    )
    config = Qwen3_5Config(
        text_config={
            **TEXT, **token_ids(tokenizer), "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24,
            "out_hidden_size": WIDTH, "num_position_embeddings": 16,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    return build(Qwen3_5ForConditionalGeneration, config, processor)
