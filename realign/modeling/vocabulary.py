"""Tokens that have a row in a model's embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from realign.modeling.families import IMAGE_TOKEN_WITHOUT_ROW, image_token_id


class Vocabulary:
    """Check for tokens without a row in a model's embedding, which would be read beyond its end.

    An embedding with more rows than the tokenizer has tokens is padded, which is common.

    Args:
        processor: The model's processor.
        config: The model's configuration.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        self._tokenizer = processor.tokenizer
        self._num_tokens = 1 + max(self._tokenizer.get_vocab().values())
        self._rows = config.get_text_config().vocab_size
        replaces = config.model_type in IMAGE_TOKEN_WITHOUT_ROW
        self._replaced = image_token_id(processor) if replaces else None

    def problem(self, name: str, ids: Iterable[int]) -> str:
        """Return a message about a token without a row in the embedding, or an empty text.

        Args:
            name: The text that the tokens belong to, for the message.
            ids: The tokens.
        """
        if self._num_tokens <= self._rows:
            return ""
        token = max((index for index in ids if index != self._replaced), default=0)
        if token < self._rows:
            return ""
        return (
            f"{name} must have tokens below {self._rows}, the number of rows of the model's "
            f"embedding, got {token} ({self._tokenizer.convert_ids_to_tokens(token)!r}) of a "
            f"tokenizer with {self._num_tokens} tokens. Use the tokenizer that the model was "
            "trained with, resize the embedding, or remove the text that has the token."
        )

    def surplus(self) -> str:
        """Return a note if the tokenizer has more tokens than rows, or an empty text."""
        if self._num_tokens <= self._rows:
            return ""
        return (
            f"the tokenizer has {self._num_tokens} tokens, but the model's embedding has only "
            f"{self._rows} rows; a row of the dataset with one of the other tokens is rejected"
        )
