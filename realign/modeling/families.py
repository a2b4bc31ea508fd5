"""Exceptions of model families to the general rules, by processor class or model type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from realign.errors import RefusedError

# Token type of an answer, for models whose attention depends on it: PaliGemma attends to tokens of
# type 0 in both directions.
ANSWER_TOKEN_TYPE = {"PaliGemmaProcessor": 1}
# position of the first token, if it is not 0
FIRST_POSITION = {"paligemma": 1}
# Chat templates of processors without one on the hub. PaliGemma's processor puts these tokens
# around a prompt.
CHAT_TEMPLATES = {
    "PaliGemmaProcessor": (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' "
        "%}<image>{% endfor %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endfor %}{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    )
}
# Tokens that a family attends to in both directions. flash-attention's causal kernel cannot, and
# transformers would drop that part of the mask silently.
SEEN_BOTH_WAYS = {"gemma3": "images", "paligemma": "prompts"}
# Families whose image token may have no row in the embedding: they replace it before embedding.
IMAGE_TOKEN_WITHOUT_ROW = ("gemma3", "gemma4", "gemma4_unified", "paligemma")


def process(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]] | None,
    *,
    add_special_tokens: bool,
    padding_side: str = "right",
) -> dict[str, Any]:
    """Call a processor on templated texts, so that every token of the template is kept.

    Args:
        processor: The model's processor.
        texts: Templated texts, with an image token for each image.
        images: Images of every text; None if no text has any.
        add_special_tokens: Whether the tokenizer adds its own special tokens.
        padding_side: Side on which shorter texts are padded.
    Returns:
        The processor's tensors. Ids where the mask is 0 have no meaning, since a tokenizer may have
        no padding token.
    Raises:
        RefusedError: The processor raises any exception; code ``processor``.
    """
    tokenizer, pad_token = processor.tokenizer, processor.tokenizer.pad_token
    if pad_token is None:  # as in the tokenizers of Llama and Mistral
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        return _process(processor, texts, images, add_special_tokens, padding_side)
    except MemoryError:
        raise
    except Exception as error:  # processors refuse their inputs with many kinds of exceptions
        sizes = sorted({f"{image.width} x {image.height}" for row in images or () for image in row})
        subject = f"image of {' or '.join(sizes)} pixels" if sizes else f"text {texts[0]!r:.80}"
        raise RefusedError(
            f"{subject} must be what {type(processor).__name__} takes, got {type(error).__name__}: "
            f"{str(error).strip().rstrip('.')}. Replace it or remove the row.",
            code="processor",
        ) from error
    finally:
        tokenizer.pad_token = pad_token


def _process(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]] | None,
    add_special_tokens: bool,
    padding_side: str,
) -> dict[str, Any]:
    options = {
        "padding": True,
        "padding_side": padding_side,
        "add_special_tokens": add_special_tokens,
        "return_tensors": "pt",
    }
    if type(processor).__name__ != "PaliGemmaProcessor":
        return dict(processor(text=[*texts], images=images, **options))
    # PaliGemma's processor adds a beginning of sequence after the images and a newline at the end,
    # even if the template has written them, and refuses a text without images.
    pictures = [image for row in images or () for image in row]
    token = processor.image_token
    expanded = [text.replace(token, token * processor.image_seq_length) for text in texts]
    inputs = dict(processor.tokenizer(expanded, return_token_type_ids=True, **options))
    if pictures:
        inputs |= processor.image_processor(pictures, return_tensors="pt")
    return inputs


def image_token_id(processor: Any) -> int | None:
    """Return the id of the token that image features replace; Gemma-3's template writes another."""
    token = next(iter(getattr(processor, "image_token_ids", ())), None)
    if token is None:
        token = getattr(processor.tokenizer, "image_token_id", None)
    if token is None:
        token = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", ""))
    return token
