"""LLaVA-1.5, LLaVA-1.6 on Vicuna and on Mistral, and the padded single view of LLaVA-1.6."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
)

from tests.realign.modeling.families.family import (
    TEXT,
    VISION,
    Family,
    build,
    make_tokenizer,
    published_template,
    token_ids,
)

# of llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-vicuna-7b-hf: the answer's end is left open
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIDE = VISION["image_size"]
VIEW = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]


def _tokenizer() -> Any:
    return make_tokenizer(
        bos="<s>", adds_bos=True, eos_token="</s>", pad_token="<pad>",
        named={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


def _processor(kind: type, image_processor: Any, template: str) -> Any:
    return kind(
        image_processor,
        _tokenizer(),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=template,
    )


def _config(kind: type, processor: Any, text: type, **options: Any) -> Any:
    return kind(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text(**TEXT, **token_ids(processor.tokenizer)),
        image_token_index=processor.tokenizer.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **options,
    )


def llava_1_5() -> Family:
    """LLaVA-1.5: one square view, Vicuna."""
    processor = _processor(LlavaProcessor, CLIPImageProcessorPil(**VIEW), VICUNA)
    config = _config(LlavaConfig, processor, LlamaConfig)
    return build(LlavaForConditionalGeneration, config, processor)


def _llava_next(text: type, template: str, **text_options: Any) -> Family:
    processor = _processor(
        LlavaNextProcessor,
        LlavaNextImageProcessorPil(**VIEW, image_grid_pinpoints=PINPOINTS),
        template,
    )
    config = _config(LlavaNextConfig, processor, text, image_grid_pinpoints=PINPOINTS)
    for name, value in text_options.items():
        setattr(config.text_config, name, value)
    return build(LlavaNextForConditionalGeneration, config, processor)


def llava_1_6_vicuna() -> Family:
    """LLaVA-1.6 at any resolution on Vicuna."""
    return _llava_next(LlamaConfig, VICUNA)


def llava_1_6_mistral() -> Family:
    """LLaVA-1.6 at any resolution on Mistral-7B-v0.2, which has no sliding window."""
    return _llava_next(MistralConfig, published_template("llava_next"), sliding_window=None)


def llava_1_6_mistral_sliding() -> Family:
    """The same with Mistral-7B-v0.1's windows, shorter than a row."""
    return _llava_next(MistralConfig, published_template("llava_next"), sliding_window=12)


def llava_1_6_single_view() -> Family:
    """LLaVA-1.6 as the paper's authors train it: one padded square view, no newline token."""
    processor = _processor(
        LlavaProcessor,
        LlavaImageProcessorPil(**VIEW, do_pad=True),
        published_template("llava_next"),
    )
    config = _config(LlavaConfig, processor, MistralConfig)
    config.text_config.sliding_window = None
    return build(LlavaForConditionalGeneration, config, processor)
