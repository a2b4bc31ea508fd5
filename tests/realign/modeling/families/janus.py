"""Janus and Janus-Pro: a Llama that also has parts for drawing, which answers never touch."""

from __future__ import annotations

from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from tests.realign.modeling.families.family import (
    TEXT,
    VISION,
    WIDTH,
    Family,
    build,
    make_tokenizer,
    token_ids,
)

# of deepseek-community/Janus-Pro-1B: the answer's end is left open
TEMPLATE = (
    "{%set seps=['\n\n','<｜end▁of▁sentence｜>']%}{%set i=0%}{%for message in messages%}"
    "{%if message['role']|lower=='user'%}<|User|>: {%elif message['role']|lower=='assistant'%}"
    "<|Assistant|>:{%if not (loop.last and not add_generation_prompt and "
    "message['content'][0]['type']=='text' and message['content'][0]['text']=='')%} {%endif%}"
    "{%else%}{{message['role'].capitalize()}}: {%endif%}{%for content in message['content']%}"
    "{%if content['type']=='image'%}{%if not loop.first%}{{'\n'}}{%endif%}<image_placeholder>"
    "{%if not loop.last%}{{'\n'}}{%endif%}{%elif content['type']=='text'%}"
    "{%set text=content['text']%}{%if loop.first%}{%set text=text.lstrip()%}{%endif%}"
    "{%if loop.last%}{%set text=text.rstrip()%}{%endif%}"
    "{%if not loop.first and message['content'][loop.index0-1]['type']=='text'%}{{' '+text}}"
    "{%else%}{{text}}{%endif%}{%endif%}{%endfor%}{%if not loop.last or add_generation_prompt%}"
    "{%if message['role']|lower=='user'%}{{seps[0]}}{%else%}{{seps[1]}}{%endif%}{%endif%}"
    "{%endfor%}{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
)


def janus() -> Family:
    """Janus-Pro, with the system prompt that its processor writes."""
    side = VISION["image_size"]
    tokenizer = make_tokenizer(
        bos="<｜begin▁of▁sentence｜>", adds_bos=True, eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
        named={
            "image_token": "<image_placeholder>", "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )  # fmt: skip
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": side, "width": side}),
        tokenizer,
        chat_template=TEMPLATE,
        use_default_system_prompt=True,
        num_image_tokens=4,
    )
    config = JanusConfig(
        text_config=LlamaConfig(**TEXT, **token_ids(tokenizer)),
        vision_config=JanusVisionConfig(
            **{key: value for key, value in VISION.items() if key != "intermediate_size"},
            mlp_ratio=2, projection_dim=WIDTH, num_image_tokens=4,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=4, num_embeddings=8, latent_channels=32, base_channels=32,
            channel_multiplier=[1, 1], num_res_blocks=1, projection_dim=WIDTH,
            image_token_embed_dim=WIDTH,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return build(JanusForConditionalGeneration, config, processor)
