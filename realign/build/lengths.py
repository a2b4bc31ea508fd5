"""Whether a prompt about an image fits into the model, known without running it.

A prompt has its text's tokens and its image's; how many an image becomes depends on its size at
most, so the processor is asked once a size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from realign.collate import Renderer, user_turns
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
        self._renderer = Renderer(processor)
        self._image_tokens: dict[tuple[int, int], int] = {}  # by size
        self._sizes: dict[Path, tuple[int, int]] = {}
        # prompt and its tokens: one is asked about all candidates in a row
        self._last: tuple[str | None, int] = (None, 0)

    def fits(self, prompt: str, image: Path) -> bool:
        """Whether the prompt about the image is no longer than the limit."""
        return self.limit is None or self.tokens(prompt, image) <= self.limit

    def tokens(self, prompt: str, image: Path) -> int:
        """How many tokens the model would read."""
        size = self._sizes.get(image) or self._sizes.setdefault(image, image_size(image))
        if size not in self._image_tokens:
            text = self._render("")
            inputs = self.processor(
                text=[text],
                images=[[Image.new("RGB", size)]],
                add_special_tokens=self._renderer.adds_special_tokens(text),
            )
            # the text's own placeholder is counted with the text
            self._image_tokens[size] = len(inputs["input_ids"][0]) - self._text_tokens(text)
        if prompt != self._last[0]:
            self._last = (prompt, self._text_tokens(self._render(prompt)))
        return self._last[1] + self._image_tokens[size]

    def _render(self, prompt: str) -> str:
        turns = user_turns([{"role": "user", "content": prompt}], num_images=1)
        return str(
            self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        )

    def _text_tokens(self, text: str) -> int:
        special = self._renderer.adds_special_tokens(text)
        return len(self.processor.tokenizer(text, add_special_tokens=special).input_ids)
