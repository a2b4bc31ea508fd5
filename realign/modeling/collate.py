"""Collation of records into a batch: C cells of P pairs in a layout of :mod:`.packing`.

Cell c of pair p is sequence ``c * P + p``. The last assistant turn and its end-of-turn token are
scored, and nothing after them. Image tokens and answers are never truncated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from realign.data.records import OpenedRecord, Record
from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer
from realign.modeling.packing import Packing
from realign.modeling.prefixes import Prefix, Prefixes, encode_prefixes

DIGEST_BYTES = 16
# The answer and the images of each cell: chosen, text_rejected, image_rejected, both_rejected.
CELLS = (("chosen", False), ("rejected", False), ("chosen", True), ("rejected", True))


def token_digest(prompt_ids: Sequence[int] | Tensor, scored_ids: Sequence[int]) -> bytes:
    """Return a digest of 16 bytes of one cell's tokens, which also tells which tokens are scored.

    Args:
        prompt_ids: Tokens before the answer, image tokens included, without padding.
        scored_ids: Tokens of the answer and its end of turn.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for ids in (prompt_ids, scored_ids):
        array = np.asarray(ids, dtype="<i4")
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    return digest.digest()


def pixel_digest(images: Mapping[str, Tensor]) -> bytes:
    """Return a digest of 16 bytes of image tensors: their names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(images):
        tensor = images[name].detach().cpu().contiguous()
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The sequence of one cell of a pair: its prefix and its scored answer."""

    id: int  # cell * P + pair
    pair: int
    retrieved: bool  # whether the images are the retrieved ones
    prefix: Prefix
    answer: list[int]
    record: Record

    def open_images(self) -> list[Image.Image]:
        """Decode the images of the prefix."""
        return self.record.open_images(rejected=self.retrieved)


# the sequences that one row holds, the longest answer first
_Row = list[_Sequence]


class Watch(Protocol):
    """Observer of the model's inputs, which may compare or keep them."""

    def __call__(
        self, collator: PreferenceCollator, record: Record, digests: Sequence[bytes]
    ) -> None:
        """Receive the digests of a record's cells, from :func:`token_digest`."""


class PreferenceCollator:
    """Collator of records into a batch for ``model(**batch)``; remove its ``ids`` first.

    Args:
        processor: The model's processor.
        cells: Number of cells of a pair, 1 to 4: chosen, text_rejected, image_rejected,
            both_rejected.
        reference: Reference log-probabilities ``(cells,)`` by ``record.key``; None omits them.
        max_length: Longest sequence in tokens, image tokens included.
        shared_prefix: Whether the answers of a pair share their images and prompt, for models of
            which :func:`realign.modeling.packing.why_not_shared` returns None.
        watch: Function that is called with the digests of every record, see :class:`Watch`.

    Example::

        >>> from pathlib import Path
        >>> from realign import PreferenceCollator, load_processor, read_records
        >>> collate = PreferenceCollator(load_processor(Path("model")), cells=3)
        >>> collate(read_records(Path("pairs.parquet"), None))["ids"]
        ['r0', 'r1']
    """

    def __init__(
        self,
        processor: Any,
        cells: int,
        reference: Mapping[str, Tensor] | None = None,
        max_length: int | None = None,
        *,
        shared_prefix: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.renderer = Renderer(processor)
        self.processor = processor
        self.cells = cells
        self.reference = reference
        self.max_length = max_length
        self.shared_prefix = shared_prefix
        self.watch = watch

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return a batch of tensors, and of plain values that stay on the host.

        - ``input_ids`` and the model's other inputs per token, shape ``(rows, T)``;
        - the processor's tensors of each distinct set of images;
        - for N answer tokens ``answer_labels``, ``answer_index`` (the token of the flattened rows
          that predicts it) and ``sequence_ids``, each ``(N,)``;
        - ``num_tokens``, C lists of P numbers, and ``ref_logps`` (C, P) if there is a reference;
        - ``packing`` and ``images``, the layout, and ``ids`` of the records.

        Raises:
            RefusedError: A sequence is longer than ``max_length``, or the chat template cannot be
                used.
        """
        records = [OpenedRecord.of(record) for record in records]
        sequences = self._sequences(records)
        rows = _shared_rows(sequences) if self.shared_prefix else [[cell] for cell in sequences]
        prefixes = self._encode(rows)
        num_tokens = [[0] * len(records) for _ in range(self.cells)]
        for sequence in sequences:
            self._check_length(sequence, prefixes)
            num_tokens[sequence.id // len(records)][sequence.pair] = len(sequence.answer)
        if self.watch is not None:
            for record, digests in zip(
                records, self._digests(sequences, prefixes, len(records)), strict=True
            ):
                self.watch(self, record, digests)
        batch = (self._packed if self.shared_prefix else self._padded)(rows, prefixes)
        batch |= {
            **prefixes.image_inputs,
            "images": prefixes.use([row[0].prefix for row in rows]),
            "answer_labels": _joined([cell.answer for row in rows for cell in row]),
            "sequence_ids": _joined([[cell.id] * len(cell.answer) for row in rows for cell in row]),
            "num_tokens": num_tokens,
            "ids": [record.id for record in records],
        }
        if self.reference is not None:
            batch["ref_logps"] = torch.stack(
                [self.reference[record.key][: self.cells] for record in records], dim=1
            ).float()
        return batch

    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Return the tokens of every record's longest sequence, image tokens included."""
        sequences = self._sequences(records)
        prefixes = self._encode([sequences])
        longest = [0] * len(records)
        for cell in sequences:
            longest[cell.pair] = max(longest[cell.pair], _length(cell, prefixes))
        return longest

    def pixel_digest(self, record: Record, *, retrieved: bool) -> bytes:
        """Return the digest of a record's images, processed alone; zeros if it has none."""
        cells = [cell for cell in self._sequences([record]) if cell.retrieved == retrieved]
        if not cells or not cells[0].prefix.images:
            return bytes(DIGEST_BYTES)
        return pixel_digest(self._encode([cells[:1]]).image_inputs)

    def _digests(
        self, sequences: Sequence[_Sequence], prefixes: Prefixes, pairs: int
    ) -> list[list[bytes]]:
        """Return the digests of every cell of every pair; zeros for absent cells."""
        digests = [[bytes(DIGEST_BYTES)] * self.cells for _ in range(pairs)]
        for cell in sequences:
            prompt = prefixes.tokens[cell.prefix]["input_ids"]
            digests[cell.pair][cell.id // pairs] = token_digest(prompt, cell.answer)
        return digests

    def _sequences(self, records: Sequence[Record]) -> list[_Sequence]:
        """Return the sequences that exist: a pair without a retrieved image has no image cells."""
        sequences = []
        for cell, (answer, retrieved) in enumerate(CELLS[: self.cells]):
            for pair, record in enumerate(records):
                images = record.rejected_images if retrieved else record.images
                if retrieved and not images:
                    continue
                rendered = self.renderer.render(
                    record.prompt, getattr(record, answer), len(images), record.where
                )
                sequences.append(
                    _Sequence(
                        cell * len(records) + pair,
                        pair,
                        retrieved,
                        Prefix(rendered.prompt, images),
                        rendered.scored_ids,
                        record,
                    )
                )
        return sequences

    def _encode(self, rows: Sequence[_Row]) -> Prefixes:
        return encode_prefixes(
            self.processor,
            {cell.prefix: cell.open_images for row in rows for cell in row},
            add_special_tokens=self.renderer.adds_special_tokens(rows[0][0].prefix.text),
        )

    def _check_length(self, sequence: _Sequence, prefixes: Prefixes) -> None:
        length = _length(sequence, prefixes)
        if self.max_length is not None and length > self.max_length:
            raise RefusedError(
                f"{sequence.record.where}: must have at most max_length = {self.max_length} "
                f"tokens, got {length}. Raise max_length or remove the row; nothing is cut."
            )

    def _padded(self, rows: list[_Row], prefixes: Prefixes) -> dict[str, Any]:
        """Lay out one sequence per row, padded on the right."""
        tokens = _row_tokens(rows, prefixes)
        # masked; the tokenizer's pad token may be beyond the model's embedding
        fill = {"input_ids": rows[0][0].answer[-1]}
        batch: dict[str, Any] = {
            name: pad_sequence(
                [line[name] for line in tokens], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in tokens[0]
        }
        lengths = torch.tensor([len(line["input_ids"]) for line in tokens])
        width = int(lengths.max())
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        batch["packing"] = None
        batch["answer_index"] = torch.cat(
            [
                torch.arange(len(cell.answer)) + row * width + prefixes.length(cell.prefix) - 1
                for row, (cell,) in enumerate(rows)
            ]
        )
        return batch

    def _packed(self, rows: list[_Row], prefixes: Prefixes) -> dict[str, Any]:
        """Lay out all rows one after the other, without padding."""
        tokens = _row_tokens(rows, prefixes)
        packing = Packing.of(
            [(prefixes.length(row[0].prefix), [len(cell.answer) for cell in row]) for row in rows]
        )
        batch: dict[str, Any] = {
            name: torch.cat([line[name] for line in tokens])[None] for name in tokens[0]
        }
        # without a mask, transformers looks for packed sequences in the positions
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["packing"] = packing
        batch["answer_index"] = _joined(
            [row.predicting(answer) for row in packing.rows for answer in range(len(row.answers))]
        )
        return batch


def _row_tokens(rows: list[_Row], prefixes: Prefixes) -> list[dict[str, Tensor]]:
    """Return the tokens of every row: its prefix, and the answers that follow it."""
    return [prefixes.with_answers(row[0].prefix, [cell.answer for cell in row]) for row in rows]


def _length(sequence: _Sequence, prefixes: Prefixes) -> int:
    return prefixes.length(sequence.prefix) + len(sequence.answer)


def _shared_rows(sequences: Sequence[_Sequence]) -> list[_Row]:
    """Group the answers of a pair about the same images into one row, pair after pair."""
    rows: dict[tuple[int, bool], _Row] = {}
    for sequence in sequences:
        rows.setdefault((sequence.pair, sequence.retrieved), []).append(sequence)
    return [
        sorted(rows[place], key=lambda cell: len(cell.answer), reverse=True)
        for place in sorted(rows)
    ]


def _joined(parts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.int64)
