"""Scoring of records for a cache: log-probabilities, and digests of the model's inputs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.collate import PreferenceCollator
from realign.modeling.identity import Identity, ModelFacts, reference_identity
from realign.modeling.loading import every_rank_loads, load_model
from realign.reference.shards import Rows
from realign.runtime.ranks import local_device


@dataclass(frozen=True)
class Scoring:
    """Settings for scoring rows with a reference model. Those that change a value are part of the
    identity.

    Attributes:
        folder: Folder of the reference model, from :func:`realign.resolve_model`.
        cells: Number of scored cells, in the order chosen, text_rejected, image_rejected,
            both_rejected.
        rejected_scoring: ``label`` or ``top_non_label``.
        numerics: Numerics of the model.
        batch_size: Pairs per forward.
        max_length: Longest sequence in tokens; a longer one is refused.

    Example::

        >>> from pathlib import Path
        >>> import torch
        >>> from realign import Numerics, Scoring
        >>> scoring = Scoring(Path("model"), 3, "label", Numerics(torch.float32))
        >>> scoring.identity()["semantics"]["rejected_scoring"]
        'label'
    """

    folder: Path
    cells: int
    rejected_scoring: str
    numerics: Numerics
    batch_size: int = 8
    max_length: int | None = None

    def identity(self) -> Identity:
        """Return everything outside a row that the values depend on."""
        return reference_identity(
            self.model, cells=self.cells, rejected_scoring=self.rejected_scoring
        )

    @cached_property
    def model(self) -> ModelFacts:
        """Facts of the model that are known without its weights."""
        return ModelFacts(self.folder, self.numerics)

    def load(self) -> Scorer:
        """Load the model and return a scorer with these settings."""
        return Scorer(self)


class RowReader:
    """Collator of records that also returns their cache rows, without log-probabilities yet.

    Args:
        processor: The model's processor.
        cells: Number of cells to score per row.
        max_length: Longest sequence in tokens.
        shared_prefix: Whether the answers of a pair share their prompt in one packed row.
    """

    def __init__(
        self,
        processor: Any,
        cells: int,
        max_length: int | None = None,
        *,
        shared_prefix: bool = False,
    ) -> None:
        self._digests: list[list[int]] = []
        self.collator = PreferenceCollator(
            processor, cells, max_length=max_length, shared_prefix=shared_prefix, watch=self._keep
        )

    def _keep(self, collator: PreferenceCollator, record: Record, digests: Sequence[bytes]) -> None:
        self._digests.append([byte for digest in digests for byte in digest])

    def read(self, records: Sequence[Record]) -> tuple[dict[str, Any], Rows]:
        """Return the model's inputs and the cache rows, with zeros for log-probabilities and pixel
        digests.

        Raises:
            RefusedError: A sequence is longer than ``max_length``.
        """
        self._digests.clear()
        batch = self.collator(records)
        del batch["ids"]
        shape = (len(records), self.collator.cells)
        rows = Rows(
            key=np.array([list(bytes.fromhex(record.key)) for record in records], np.uint8),
            logps=np.zeros(shape),
            num_tokens=np.array(batch["num_tokens"], np.int32).T.copy(),
            token_digest=np.array(self._digests, np.uint8).reshape(*shape, 16),
            pixel_digest=np.zeros((len(records), 2, 16), np.uint8),
        )
        return batch, rows


class Scorer:
    """Scorer of records with the reference model, in evaluation mode and without gradients."""

    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self._device = local_device()
        with every_rank_loads():
            self._model: Any = load_model(scoring.folder, scoring.numerics).eval()
            if scoring.numerics.quantization is None:  # a quantized model is on its GPU already
                self._model.to(self._device)
        processor, cells = scoring.model.processor, scoring.cells
        self._batches, self._alone = (
            RowReader(processor, cells, scoring.max_length, shared_prefix=shared)
            for shared in (scoring.model.layout == "shared prefix", False)
        )

    def score(self, records: Sequence[Record]) -> Rows:
        """Score one batch, in the layout that training uses.

        Raises:
            FloatingPointError: A log-probability is not finite; the message names the row.
            RefusedError: A sequence is longer than ``max_length``.
        """
        return self._score(self._batches, records)

    def score_alone(self, record: Record) -> Rows:
        """Score one record with a separate input row for every cell."""
        return self._score(self._alone, [record])

    def pixel_digests(self, record: Record) -> np.ndarray:
        """Return the pixel digests of the original and of the retrieved images, ``(2, 16)``."""
        collator = self._alone.collator
        digests = [
            collator.pixel_digest(record, retrieved=retrieved) for retrieved in (False, True)
        ]
        return np.array([list(digest) for digest in digests], np.uint8)

    @torch.inference_mode()
    def _score(self, reader: RowReader, records: Sequence[Record]) -> Rows:
        batch, rows = reader.read(records)
        is_cast = self.scoring.numerics.autocast
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_cast):
            try:
                output = self._model(
                    **send_to_device(batch, self._device),
                    rejected_scoring=self.scoring.rejected_scoring,
                )
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise RefusedError(
                    f"the reference must fit into memory, {len(records)} pairs in one forward did "
                    "not. Run `realign cache` with a smaller --set cache.batch_size, and pass "
                    "--cache."
                ) from error
        bad = ~torch.isfinite(output.logps).all(dim=0)
        if bad.any():
            record = records[int(bad.nonzero()[0])]
            raise FloatingPointError(
                f"reference log-probabilities of row {record.id} must be finite, got "
                f"{output.logps[:, bad][:, 0].tolist()}. Nothing of its shard was stored."
            )
        return replace(rows, logps=output.logps.double().T.cpu().contiguous().numpy())


def free_reference() -> None:
    """Free the memory of deleted scorers before the policy is loaded. A model holds its own bound
    forward, a reference cycle that only the garbage collector finds.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
