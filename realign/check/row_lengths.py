"""How long the rows of a dataset are for a model, and what its template makes of them, without its
weights and mostly without its image processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from realign.check.decoding import DecodedRow
from realign.collate import CELLS, PreferenceCollator
from realign.errors import RefusedError
from realign.image_tokens import ImageTokens
from realign.inspection import ImageFacts
from realign.problems import Problem
from realign.rendering import Renderer

# rows of each number of images whose predicted length is compared with the collator's
_COMPARED = 3


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

    def problems(self, row: DecodedRow) -> Iterator[Problem]:
        """Those of the next row, whose texts and images are good. Codes: ``template``,
        ``no-scored-token``, ``too-long``.
        """
        record = row.record

        def problem(field: str, code: str, message: str) -> Problem:
            return Problem(record.id, record.where, field, code, f"{record.where}: {message}")

        try:
            length, unscored = self._measure(row)
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

    def _measure(self, row: DecodedRow) -> tuple[int, list[str]]:
        """Tokens of the longest cell, and the answers that have none."""
        record = row.record
        unscored = []
        lengths = []
        for answer, retrieved in CELLS[: self.cells]:
            if retrieved and not record.rejected_images:
                continue
            images = row.rejected_images if retrieved else row.images
            rendered = self._renderer.render(
                record.prompt, getattr(record, answer), len(images), record.where
            )
            # all that is scored but the end of turn
            answer_ids = rendered.scored_ids[:-1]
            if not retrieved and not self._renderer.tokenizer.decode(answer_ids).strip():
                unscored.append(answer)
            tokens = [
                self._image_tokens((facts.width, facts.height))
                for facts in images
                if isinstance(facts, ImageFacts)
            ]
            if answer == "chosen":
                self.images.update(1 + more for more in tokens)  # with the placeholder
            prompt = self._image_tokens.text_tokens(rendered.prompt)
            lengths.append(prompt + len(rendered.scored_ids) + sum(tokens))
        return self._confirmed(row, max(lengths)), unscored

    def _confirmed(self, row: DecodedRow, predicted: int) -> int:
        shape = (len(row.images), len(row.rejected_images))
        if self.is_predicted and self._compared[shape] == _COMPARED:
            return predicted
        self._compared[shape] += 1
        (length,) = self._collator.lengths([row.record])
        self.is_predicted = self.is_predicted and length == predicted
        return length
