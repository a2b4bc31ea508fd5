"""InternVL 2.5 to 3.5: InternViT on tiles, Qwen2."""

from __future__ import annotations

from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from tests.realign.modeling.families.family import (
    TEXT,
    VISION,
    Family,
    build,
    token_ids,
    with_videos,
)
from tests.realign.modeling.families.qwen_vl import make_qwen_tokenizer

# of OpenGVLab/InternVL3-1B-hf
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SIDE = 56  # 16 patches, a quarter of them after the downsampling


def internvl() -> Family:
    """InternVL3 with up to three tiles and a thumbnail."""
    tokenizer = make_qwen_tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    processor = with_videos(
        InternVLProcessor,
        GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=3
        ),
        tokenizer,
        "InternVLVideoProcessor",
        image_seq_length=4,
        chat_template=TEMPLATE,
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**VISION, "image_size": SIDE}),
        text_config=Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return build(InternVLForConditionalGeneration, config, processor)
