"""From records to the batch that the loss reads: C cells of P pairs, cell-major, padded on the
right.

Cell c of pair p is row ``c * P + p``. What is scored is the last assistant turn and the template's
end-of-turn token, nothing after it; image tokens are never cut and answers never truncated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realign.errors import RefusedError
from realign.records import Record

IGNORE_INDEX = -100
# Which answer and which images each cell scores (DESIGN: chosen, text_rejected, image_rejected,
# both_rejected).
CELLS = (("chosen", False), ("rejected", False), ("chosen", True), ("rejected", True))


def user_turns(prompt: Sequence[Mapping[str, str]], num_images: int) -> list[dict[str, Any]]:
    """Messages in the parts form of chat templates, the images in front of the first user turn."""
    turns: list[dict[str, Any]] = []
    images = num_images
    for message in prompt:
        parts: list[dict[str, str]] = [{"type": "text", "text": message["content"]}]
        if message["role"] == "user" and images:
            parts = [{"type": "image"}] * images + parts
            images = 0
        turns.append({"role": message["role"], "content": parts})
    return turns


@dataclass(frozen=True)
class RenderedRow:
    """A templated conversation before image tokens are expanded."""

    text: str
    answer_ids: list[int]  # everything after the prompt
    num_scored: int  # how many of answer_ids, from the first, are scored


class Renderer:
    """Applies a processor's chat template and finds the answer's tokens in it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # not only the named ones: Gemma's end of turn is special in tokenizer.json alone
        added = self.tokenizer.added_tokens_decoder
        self._special = set(self.tokenizer.all_special_ids) | {
            index for index, token in added.items() if token.special
        }

    def placeholders(self) -> list[str]:
        """Tokens that no answer may contain."""
        special = self.tokenizer.convert_ids_to_tokens(sorted(self._special))
        return [*special, getattr(self.processor, "image_token", "")]

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must still add its own: a template that wrote the first one has
        done so.
        """
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def render(
        self, prompt: Sequence[Mapping[str, str]], answer: str, num_images: int, where: str
    ) -> RenderedRow:
        """Template one conversation.

        Raises:
            RefusedError: The templated prompt is not a prefix of the templated conversation, or the
                answer is changed.
        """
        turns = user_turns(prompt, num_images)
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt_text = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        text = self.processor.apply_chat_template([*turns, reply], tokenize=False)
        start = text.find(answer.strip(), len(prompt_text))
        if not text.startswith(prompt_text) or start < 0:
            raise RefusedError(
                f"{where}: the chat template must keep the prompt and the answer as they are, got "
                f"{text[-120:]!r} "
                f"after {prompt_text[-60:]!r}. Use a template whose generation prompt begins the "
                f"assistant turn."
            )
        end = start + len(answer.strip())
        if not self._ends_turn(text[end:]):
            text = text[:end] + self._end_of_sequence(text[end:], where)
        special = self.adds_special_tokens(text)
        prompt_ids = self.tokenizer(prompt_text, add_special_tokens=special).input_ids
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoded.input_ids[: len(prompt_ids)] != prompt_ids:
            raise RefusedError(
                f"{where}: the prompt's tokens change when the answer follows. Use another "
                f"template."
            )
        answer_ids = encoded.input_ids[len(prompt_ids) :]
        offsets = encoded.offset_mapping[len(prompt_ids) :]
        after = next(
            (
                i
                for i, (begin, _) in enumerate(offsets)
                if begin >= end and answer_ids[i] in self._special
            ),
            None,
        )
        if after is None:
            raise RefusedError(
                f"{where}: no end-of-turn token follows the answer, got {text[-60:]!r}. Make the "
                "tokenizer's end of turn a special token."
            )
        return RenderedRow(text, answer_ids, after + 1)

    def _end_of_sequence(self, tail: str, where: str) -> str:
        """What ends the turn for a template that does not: LLaVA-1.5's writes a space."""
        if tail.strip() or not self.tokenizer.eos_token:
            raise RefusedError(
                f"{where}: the chat template of {type(self.processor).__name__} "
                f"{self.tokenizer.name_or_path} must end the answer with a special token or leave "
                f"it open, got {tail!r} and eos_token {self.tokenizer.eos_token!r}. Make the end "
                "of turn a special token of the tokenizer."
            )
        return str(self.tokenizer.eos_token)

    def _ends_turn(self, tail: str) -> bool:
        return any(
            i in self._special for i in self.tokenizer(tail, add_special_tokens=False).input_ids
        )


class PreferenceCollator:
    """Collates records into model inputs and shifted labels.

    Args:
        processor: The model's processor.
        cells: How many of chosen, text_rejected, image_rejected, both_rejected a pair has, 1 to 4.
        reference: ``record.key`` to reference log-probabilities, shape ``(cells,)``; None leaves
            them out.
        max_length: Longest row in tokens, image tokens included.
    """

    def __init__(
        self,
        processor: Any,
        cells: int,
        reference: Mapping[str, Tensor] | None = None,
        max_length: int | None = None,
    ) -> None:
        self.renderer = Renderer(processor)
        self.processor = processor
        self.cells = cells
        self.reference = reference
        self.max_length = max_length

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the processor's inputs, ``preference_labels`` (C*P, T), ``ref_logps`` (C, P) if
        known, and ``ids``.

        Raises:
            RefusedError: A row is longer than ``max_length``.
        """
        rows: list[RenderedRow] = []
        images: list[list[Any]] = []
        present: list[bool] = []
        for answer, retrieved in CELLS[: self.cells]:
            for record in records:
                # A pair without a retrieved image has no image cells: the row is there, nothing in
                # it is scored.
                present.append(not retrieved or bool(record.rejected_images))
                images.append(record.open_images(rejected=retrieved and present[-1]))
                where = record.where
                rows.append(
                    self.renderer.render(
                        record.prompt, getattr(record, answer), len(images[-1]), where
                    )
                )
        batch = self._process([row.text for row in rows], images)
        batch["preference_labels"] = self._labels(batch, rows, present, records)
        batch["ids"] = [record.id for record in records]
        if self.reference is not None:
            batch["ref_logps"] = torch.stack(
                [self.reference[record.key][: self.cells] for record in records], dim=1
            ).float()
        return batch

    def _process(self, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
        return dict(
            self.processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                padding_side="right",
                add_special_tokens=self.renderer.adds_special_tokens(texts[0]),
                return_tensors="pt",
            )
        )

    def _labels(
        self,
        batch: Mapping[str, Tensor],
        rows: list[RenderedRow],
        present: list[bool],
        records: Sequence[Record],
    ) -> Tensor:
        input_ids = batch["input_ids"]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for index, (row, length) in enumerate(
            zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True)
        ):
            record = records[index % len(records)]
            if self.max_length is not None and length > self.max_length:
                raise RefusedError(
                    f"{record.where}: must have at most max_length = {self.max_length} tokens, "
                    f"got {length}. "
                    "Raise max_length or remove the row; nothing is cut."
                )
            start = length - len(row.answer_ids)
            if (found := input_ids[index, start:length].tolist()) != row.answer_ids:
                raise RefusedError(
                    f"{record.where}: {type(self.processor).__name__} must leave the answer as "
                    f"the chat template writes it, got {self.renderer.tokenizer.decode(found)!r} "
                    f"instead of {self.renderer.tokenizer.decode(row.answer_ids)!r}. Use another "
                    "processor; only image tokens may be added."
                )
            if present[index]:
                scored = slice(start, start + row.num_scored)
                labels[index, scored] = input_ids[index, scored]
        # the token at t is predicted by the hidden state at t - 1
        return torch.cat([labels[:, 1:], labels.new_full((len(rows), 1), IGNORE_INDEX)], dim=1)
