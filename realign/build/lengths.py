"""Whether a prompt about an image fits into the model, known without running it.

A prompt has its text's tokens and its image's; how many an image becomes depends on its size at
most, so the processor is asked once a size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realign.image_tokens import ImageTokens
from realign.images import image_size


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model was made for; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class PromptLength:
    """Measures prompts as the generator will see them.

    Args:
        processor: The model's processor.
        limit: Longest prompt in tokens, image tokens included; None for any.
    """

    def __init__(self, processor: Any, limit: int | None) -> None:
        self.processor, self.limit = processor, limit
        self._image_tokens = ImageTokens(processor)
        self._sizes: dict[Path, tuple[int, int]] = {}
        # prompt and its tokens: one is asked about all candidates in a row
        self._last: tuple[str | None, int] = (None, 0)

    def fits(self, prompt: str, image: Path) -> bool:
        """Whether the prompt about the image is no longer than the limit."""
        return self.limit is None or self.tokens(prompt, image) <= self.limit

    def tokens(self, prompt: str, image: Path) -> int:
        """How many tokens the model would read."""
        size = self._sizes.get(image) or self._sizes.setdefault(image, image_size(image))
        if prompt != self._last[0]:
            self._last = (prompt, self._image_tokens.prompt_tokens(prompt))
        return self._last[1] + self._image_tokens(size)
