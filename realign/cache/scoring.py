"""From records to rows of a cache: the reference model's log-probabilities and what it was fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realign.cache.identity import Identity, reference_identity
from realign.cache.shards import Rows
from realign.collate import PreferenceCollator
from realign.modeling import load_model, load_processor
from realign.records import Record
from realign.row_digest import DIGEST_BYTES, token_digest


@dataclass(frozen=True)
class Scoring:
    """How rows are scored. What of it changes a value is in the identity.

    Attributes:
        folder: The reference model, from :func:`realign.modeling.resolve_model`.
        cells: How many of chosen, text_rejected, image_rejected, both_rejected are scored.
        rejected_scoring: ``label`` or ``top_non_label``.
        dtype: Of the weights.
        batch_size: Pairs in one forward.
        max_length: Longest row in tokens; a longer one is refused.
        shared_prefix: Whether the answers of a pair stand behind one prefix.
        device: Where.
    """

    folder: Path
    cells: int
    rejected_scoring: str
    dtype: torch.dtype
    batch_size: int
    max_length: int | None = None
    shared_prefix: bool = False
    device: torch.device | str = "cpu"

    def identity(self) -> Identity:
        """What the values depend on outside a row."""
        return reference_identity(
            self.folder,
            cells=self.cells,
            rejected_scoring=self.rejected_scoring,
            dtype=self.dtype,
            shared_prefix=self.shared_prefix,
        )

    def load(self) -> Scorer:
        """Load the model."""
        return Scorer(self)


class Scorer:
    """Scores records with the reference model, in evaluation mode and without gradients."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self.model = load_model(scoring.folder, scoring.dtype).to(scoring.device).eval()
        self.processor = load_processor(scoring.folder)

    def score(self, records: Sequence[Record]) -> Rows:
        """Score one batch as training will feed it.

        Raises:
            FloatingPointError: A log-probability is not finite; the message names the row.
            RefusedError: A row is longer than ``max_length``.
        """
        return self._score(records, shared_prefix=self.scoring.shared_prefix)

    def score_alone(self, record: Record) -> Rows:
        """Score one record with a row of its own for every cell."""
        return self._score([record], shared_prefix=False)

    @torch.inference_mode()
    def _score(self, records: Sequence[Record], *, shared_prefix: bool) -> Rows:
        scoring = self.scoring
        collator = PreferenceCollator(self.processor, scoring.cells, max_length=scoring.max_length)
        batch = collator(records)
        ids = batch.pop("ids")
        tokens, pixels = _digests(batch, collator, records)
        # no reference of its own: zeros say how many cells there are
        batch["ref_logps"] = torch.zeros(scoring.cells, len(records))
        inputs = {
            name: value.to(scoring.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        output = self.model(**inputs, rejected_scoring=scoring.rejected_scoring)
        bad = ~torch.isfinite(output.logps).all(dim=0)
        if bad.any():
            raise FloatingPointError(
                f"reference log-probabilities of row {ids[int(bad.nonzero()[0])]} must be finite, "
                f"got {output.logps[:, bad][:, 0].tolist()}. Nothing of its shard was stored."
            )
        return Rows(
            key=np.array([list(bytes.fromhex(record.key)) for record in records], np.uint8),
            logps=output.logps.double().T.cpu().contiguous().numpy(),
            num_tokens=output.num_tokens.int().T.cpu().contiguous().numpy(),
            token_digest=tokens,
            pixel_digest=pixels,
        )


def _digests(batch, collator, records):
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["preference_labels"]
    tokens = np.zeros((len(records), collator.cells, DIGEST_BYTES), np.uint8)
    for row in range(len(ids)):
        cell, pair = divmod(row, len(records))
        scored = labels[row][labels[row] != -100]
        if len(scored):
            start = int((labels[row] != -100).nonzero()[0]) + 1
            tokens[pair, cell] = list(token_digest(ids[row, :start], scored))
    return tokens, np.zeros((len(records), 2, DIGEST_BYTES), np.uint8)
