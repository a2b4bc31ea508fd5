"""LLaVA-OneVision: SigLIP at any resolution, Qwen2."""

from __future__ import annotations

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
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

# of llava-hf/llava-onevision-qwen2-7b-ov-hf: a turn writes "assistant " and a newline before the
# answer, the generation prompt "assistant" and a newline
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
SIDE = VISION["image_size"]
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def llava_onevision() -> Family:
    """LLaVA-OneVision."""
    tokenizer = make_qwen_tokenizer(image_token="<image>", video_token="<video>")
    processor = with_videos(
        LlavaOnevisionProcessor,
        LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer,
        "LlavaOnevisionVideoProcessor",
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    )
    return build(LlavaOnevisionForConditionalGeneration, config, processor)
