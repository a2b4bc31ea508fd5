"""What a family of models needs beyond the general rule, by the name of its processor's class or
its model type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from realign.errors import RefusedError

# Token type of an answer where the model tells tokens apart by type: PaliGemma sees those of type 0
# in both directions.
ANSWER_TOKEN_TYPE = {"PaliGemmaProcessor": 1}
# where the first token stands, if not at 0
FIRST_POSITION = {"paligemma": 1}
# Of processors that have none on the hub. PaliGemma's own puts these tokens around a prompt.
CHAT_TEMPLATES = {
    "PaliGemmaProcessor": (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' "
        "%}<image>{% endfor %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
}
# What a family sees in both directions, which flash-attention's causal kernel would not: by itself
# transformers drops that part of the mask.
SEEN_BOTH_WAYS = {"gemma3": "images", "paligemma": "prompts"}


def refuse_flash(model: Any) -> None:
    """Refuse flash-attention where it would score another model.

    Raises:
        RefusedError: The family needs a mask of its own.
    """
    attention = model.config.get_text_config()._attn_implementation or ""
    seen = SEEN_BOTH_WAYS.get(model.config.model_type)
    if seen and "flash" in attention:
        raise RefusedError(
            f"attention must be sdpa for {type(model).__name__}, which sees {seen} in both "
            f"directions, got {attention}. Drop that option."
        )


def process(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]] | None,
    *,
    add_special_tokens: bool,
    padding_side: str = "right",
) -> dict[str, Any]:
    """Call a processor on templated texts, which keep every token that the template wrote.

    Args:
        processor: The model's processor.
        texts: Templated, an image token where an image stands.
        images: Of every text; None where none has any.
        add_special_tokens: Whether the tokenizer adds its own.
        padding_side: Where shorter texts are padded.
    Returns:
        Tensors.
    """
    options = {
        "padding": True,
        "padding_side": padding_side,
        "add_special_tokens": add_special_tokens,
        "return_tensors": "pt",
    }
    if type(processor).__name__ != "PaliGemmaProcessor":
        return dict(processor(text=[*texts], images=images, **options))
    # PaliGemma's puts a beginning of sequence behind the images and a newline behind all, also
    # behind those of the template, and refuses a text without images.
    pictures = [image for row in images or () for image in row]
    token = processor.image_token
    expanded = [text.replace(token, token * processor.image_seq_length) for text in texts]
    inputs = dict(processor.tokenizer(expanded, return_token_type_ids=True, **options))
    if pictures:
        inputs |= processor.image_processor(pictures, return_tensors="pt")
    return inputs


def image_token_id(processor: Any) -> int | None:
    """The token in whose place the model puts a feature of an image: not always the one that stands
    for an image in a template (Gemma-3).
    """
    token = next(iter(getattr(processor, "image_token_ids", ())), None)
    if token is None:
        token = getattr(processor.tokenizer, "image_token_id", None)
    if token is None:
        token = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", ""))
    return token
