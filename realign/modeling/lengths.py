"""How many tokens an image becomes, which depends on its size at most: the processor is asked once
a size, with an empty image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from realign.data.images import Size
from realign.data.records import Problem, Record
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer, user_turns
from realign.modeling.collate import CELLS, PreferenceCollator
from realign.modeling.families import process

# rows of each number of images whose predicted length is compared with the collator's
_COMPARED = 3


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


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model was made for; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class RowLengths:
    """Predicts lengths: tokens of the templated text, and those that images of that size become.

    The prediction is compared with the collator on the first rows; for a processor of which it is
    not true, every row is collated, which is slow and exact.

    Args:
        processor: The model's processor.
        limits: What a row must not be longer than: name to tokens.
        cells: How many sequences a row is, 1 to 4.
    Attributes:
        cells: How many sequences a row is.
        rows: Tokens of each row's longest cell.
        images: How many images became how many tokens.
        is_predicted: Whether the prediction has been true so far.
    """

    def __init__(self, processor: Any, limits: dict[str, int], cells: int = 3) -> None:
        self._renderer, self._image_tokens = Renderer(processor), ImageTokens(processor)
        self._collator = PreferenceCollator(processor, cells)
        self._limits = limits
        self._compared: Counter[tuple[int, int]] = Counter()
        self.cells = cells
        self.rows: list[int] = []
        self.images: Counter[int] = Counter()
        self.is_predicted = True

    @property
    def fitting(self) -> list[int]:
        """Tokens of the rows that are within the limits."""
        return [row for row in self.rows if all(row <= most for most in self._limits.values())]

    def problems(
        self, record: Record, images: Sequence[Size], rejected_images: Sequence[Size]
    ) -> Iterator[Problem]:
        """Yield the problems of the next row, whose texts and images are good.

        Codes: ``template``, ``no-scored-token``, ``too-long``.

        Args:
            record: The row.
            images: Sizes of its original images.
            rejected_images: Sizes of its retrieved images.
        """

        def problem(field: str, code: str, message: str) -> Problem:
            return Problem(record.id, record.where, field, code, f"{record.where}: {message}")

        try:
            length, unscored = self._measure(record, images, rejected_images)
        except RefusedError as error:
            yield Problem(record.id, record.where, "", "template", str(error))
            return
        for name in unscored:
            said = f"got {getattr(record, name)[:80]!r}, which its tokenizer drops. Remove the row."
            yield problem(name, "no-scored-token", f"{name} must have a token to score, {said}")
        self.rows.append(length)
        for name, limit in self._limits.items():
            if length > limit:
                said = f"got {length}. Shorten or remove the row; nothing is cut."
                yield problem("", "too-long", f"must have at most {name} = {limit} tokens, {said}")

    def _measure(
        self, record: Record, images: Sequence[Size], rejected_images: Sequence[Size]
    ) -> tuple[int, list[str]]:
        """Return the tokens of the longest cell, and the answers that have none."""
        unscored = []
        lengths = []
        for answer, retrieved in CELLS[: self.cells]:
            if retrieved and not record.rejected_images:
                continue
            sizes = rejected_images if retrieved else images
            rendered = self._renderer.render(
                record.prompt, getattr(record, answer), len(sizes), record.where
            )
            # all that is scored but the end of turn
            answer_ids = rendered.scored_ids[:-1]
            if not retrieved and not self._renderer.tokenizer.decode(answer_ids).strip():
                unscored.append(answer)
            tokens = [*map(self._image_tokens, sizes)]
            if answer == "chosen":
                self.images.update(1 + more for more in tokens)  # with the placeholder
            prompt = self._image_tokens.text_tokens(rendered.prompt)
            lengths.append(prompt + len(rendered.scored_ids) + sum(tokens))
        return self._confirmed(record, max(lengths)), unscored

    def _confirmed(self, record: Record, predicted: int) -> int:
        shape = (len(record.images), len(record.rejected_images))
        if self.is_predicted and self._compared[shape] == _COMPARED:
            return predicted
        self._compared[shape] += 1
        (length,) = self._collator.lengths([record])
        self.is_predicted = self.is_predicted and length == predicted
        return length
