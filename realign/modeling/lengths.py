"""Prediction of token counts. The number of an image's tokens depends on its size alone, so the
processor is called once per size, with an empty image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from realign.data.images import Size
from realign.data.records import Problem, Record, special_tokens, surroundings
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer, user_turns
from realign.modeling.collate import CELLS, PreferenceCollator
from realign.modeling.families import process
from realign.modeling.vocabulary import Vocabulary

# rows of each number of images whose predicted length is compared with the collator's
_COMPARED = 3


class ImageTokens:
    """Number of tokens of images, by their size, in addition to the placeholder in the text.

    Args:
        processor: The model's processor.
        vocabulary: The tokens that the model has; None if its configuration is not known.
    """

    def __init__(self, processor: Any, vocabulary: Vocabulary | None = None) -> None:
        self._processor, self._renderer = processor, Renderer(processor)
        self._vocabulary = vocabulary
        self._special = special_tokens(self._renderer.placeholders())
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, size: tuple[int, int]) -> int:
        """Return the number of tokens that an image of ``(width, height)`` adds to its text.

        Raises:
            RefusedError: The processor does not take such an image (code ``processor``), or adds
                a token that the model does not have (``token-id``).
        """
        if size not in self._known:
            text = self._render("")
            inputs = process(
                self._processor,
                [text],
                [[Image.new("RGB", size)]],
                add_special_tokens=self._renderer.adds_special_tokens(text),
            )
            ids = inputs["input_ids"][0].tolist()
            if self._vocabulary and (message := self._vocabulary.problem("prompt", ids)):
                raise RefusedError(message, code="token-id")
            # the text's own placeholder is counted with the text
            self._known[size] = len(ids) - len(self.text_ids(text))
        return self._known[size]

    def check(self, prompt: str, size: Size | None) -> None:
        """Refuse a prompt that the model cannot read.

        Args:
            prompt: Text of the prompt.
            size: Width and height of its image; None without one.
        Raises:
            RefusedError: The prompt holds a special token (code ``special-token``), the chat
                template takes no text without an image (``template``), or the processor takes no
                image of this size.
        """
        for token in self._special:
            if token in prompt:
                raise RefusedError(
                    f"text must not contain the special token {token!r}, got "
                    f"{surroundings(prompt, token)!r}. Remove it from the text.",
                    code="special-token",
                )
        ids = self.prompt_ids(prompt) if size else self._ids_without_image(prompt)
        if self._vocabulary and (message := self._vocabulary.problem("text", ids)):
            raise RefusedError(message, code="token-id")
        if size:
            self(size)

    def _ids_without_image(self, prompt: str) -> list[int]:
        try:
            text = self._render(prompt, num_images=0)
        except Exception as error:  # a template may raise any exception to refuse turns
            raise _without_image("the chat template", error, "template") from None
        special = self._renderer.adds_special_tokens(text)
        try:
            inputs = process(self._processor, [text], None, add_special_tokens=special)
        except RefusedError as error:
            name = type(self._processor).__name__
            raise _without_image(name, error.__cause__ or error, "processor") from None
        ids: list[int] = inputs["input_ids"][0].tolist()
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a templated text, with a placeholder for each image."""
        special = self._renderer.adds_special_tokens(text)
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=special).input_ids
        return ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt about one image, with a placeholder for the image."""
        return self.text_ids(self._render(prompt))

    def _render(self, prompt: str, num_images: int = 1) -> str:
        turns = user_turns([{"role": "user", "content": prompt}], num_images=num_images)
        template = self._processor.apply_chat_template
        return str(template(turns, add_generation_prompt=True, tokenize=False))


def _without_image(reader: str, error: BaseException, code: str) -> RefusedError:
    reason = " ".join(str(error).split()).rstrip(".")
    return RefusedError(
        f"text must have an image, which {reader} requires, got none ({type(error).__name__}: "
        f"{reason}). Leave such questions out, or ask a model that takes text alone.",
        code=code,
    )


def position_limit(config: Any) -> int | None:
    """Return the longest sequence of a model; None if its configuration does not state it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class _Cell(NamedTuple):
    """A sequence of a row before its image tokens are expanded."""

    answer: str  # chosen or rejected
    is_retrieved: bool
    sizes: Sequence[Size]
    prompt_ids: list[int]
    scored_ids: list[int]


class RowLengths:
    """Predictor of the lengths of rows, from the templated text and the sizes of images.

    On the first rows, the prediction is compared with the collator; if they differ, every row is
    collated, which is slow but exact.

    Args:
        processor: The model's processor.
        limits: Limits on the length of a row in tokens, by their names.
        cells: Number of sequences of a row, 1 to 4.
        vocabulary: The tokens that the model has; None if its configuration is not known.
    Attributes:
        cells: Number of sequences of a row.
        rows: Tokens of each row's longest cell.
        images: Number of images, by their number of tokens.
        is_predicted: Whether the predictions have been correct so far.
    """

    def __init__(
        self,
        processor: Any,
        limits: dict[str, int],
        cells: int = 3,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._renderer = Renderer(processor)
        self._image_tokens, self._vocabulary = ImageTokens(processor, vocabulary), vocabulary
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

        Codes: ``processor``, ``template``, ``token-id``, ``no-scored-token``, ``too-long``.

        Args:
            record: The row.
            images: Sizes of its original images.
            rejected_images: Sizes of its retrieved images.
        """

        def problem(field: str, code: str, message: str) -> Problem:
            return Problem(record.id, record.where, field, code, f"{record.where}: {message}")

        try:
            cells = self._cells(record, images, rejected_images)
        except RefusedError as error:
            yield Problem(record.id, record.where, "", "template", str(error))
            return
        found = {}
        for cell in cells:
            for name, ids in (("prompt", cell.prompt_ids), (cell.answer, cell.scored_ids)):
                if self._vocabulary and (message := self._vocabulary.problem(name, ids)):
                    found[name] = problem(name, "token-id", message)
            for size in cell.sizes:
                try:
                    self._image_tokens(size)
                except RefusedError as error:
                    field = "rejected_images" if cell.is_retrieved else "images"
                    place = record.image_place(rejected=cell.is_retrieved)
                    message = f"{place}: {error}"
                    found[place] = Problem(record.id, record.where, field, error.code, message)
        if found:
            yield from found.values()
            return
        try:
            length = self._measure(record, cells)
        except RefusedError as error:  # from the collator, for the row's images together
            yield problem("", error.code, str(error))
            return
        for cell in cells:
            # the scored tokens without the end of turn
            decoded = self._renderer.tokenizer.decode(cell.scored_ids[:-1])
            if not cell.is_retrieved and not decoded.strip():
                answer = getattr(record, cell.answer)[:80]
                value = f"got {answer!r}, which its tokenizer drops. Remove the row."
                message = f"{cell.answer} must have a token to score, {value}"
                yield problem(cell.answer, "no-scored-token", message)
        self.rows.append(length)
        for name, limit in self._limits.items():
            if length > limit:
                value = f"got {length}. Shorten or remove the row; nothing is cut."
                yield problem("", "too-long", f"must have at most {name} = {limit} tokens, {value}")

    def _cells(
        self, record: Record, images: Sequence[Size], rejected_images: Sequence[Size]
    ) -> list[_Cell]:
        cells = []
        for answer, is_retrieved in CELLS[: self.cells]:
            if is_retrieved and not record.rejected_images:
                continue
            sizes = rejected_images if is_retrieved else images
            rendered = self._renderer.render(
                record.prompt, getattr(record, answer), len(sizes), record.where
            )
            prompt_ids = self._image_tokens.text_ids(rendered.prompt)
            cells.append(_Cell(answer, is_retrieved, sizes, prompt_ids, rendered.scored_ids))
        return cells

    def _measure(self, record: Record, cells: Sequence[_Cell]) -> int:
        """Return the tokens of the longest cell."""
        lengths = []
        for cell in cells:
            tokens = [*map(self._image_tokens, cell.sizes)]
            lengths.append(len(cell.prompt_ids) + len(cell.scored_ids) + sum(tokens))
            if cell.answer == "chosen":
                self.images.update(1 + added for added in tokens)  # with the placeholder
        return self._confirmed(record, max(lengths))

    def _confirmed(self, record: Record, predicted: int) -> int:
        shape = (len(record.images), len(record.rejected_images))
        if self.is_predicted and self._compared[shape] == _COMPARED:
            return predicted
        self._compared[shape] += 1
        (length,) = self._collator.lengths([record])
        self.is_predicted = self.is_predicted and length == predicted
        return length
