"""How many tokens an image becomes, which depends on its size at most: the processor is asked once
a size, with an empty image.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from realign.families import process
from realign.rendering import Renderer, user_turns


class ImageTokens:
    """Tokens of images, by size, beyond the placeholder that stands in the text.

    Args:
        processor: The model's processor.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._renderer = processor, Renderer(processor)
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, size: tuple[int, int]) -> int:
        """How many tokens an image of ``(width, height)`` adds to its text."""
        if size not in self._known:
            text = self._render("")
            inputs = process(
                self._processor,
                [text],
                [[Image.new("RGB", size)]],
                add_special_tokens=self._renderer.adds_special_tokens(text),
            )
            # the text's own placeholder is counted with the text
            self._known[size] = len(inputs["input_ids"][0]) - self.text_tokens(text)
        return self._known[size]

    def text_tokens(self, text: str) -> int:
        """How many tokens a templated text has, a placeholder for one."""
        special = self._renderer.adds_special_tokens(text)
        return len(self._processor.tokenizer(text, add_special_tokens=special).input_ids)

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt about one image has, its placeholder for one."""
        return self.text_tokens(self._render(prompt))

    def _render(self, prompt: str) -> str:
        turns = user_turns([{"role": "user", "content": prompt}], num_images=1)
        template = self._processor.apply_chat_template
        return str(template(turns, add_generation_prompt=True, tokenize=False))
