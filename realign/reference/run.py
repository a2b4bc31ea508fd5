"""The command ``realign cache``."""

from __future__ import annotations

from pathlib import Path

from realign.config import CacheConfig, Effect
from realign.data.dataset import read_kept_records
from realign.modeling.acceleration import Numerics
from realign.modeling.adapter_folder import check_adapter
from realign.modeling.folder import resolve_model
from realign.modeling.loading import choose_dtype
from realign.modeling.row_checks import check_rows
from realign.modeling.vocabulary import Vocabulary
from realign.reference.build import build_cache
from realign.reference.scoring import Scoring
from realign.runtime.run_folder import check_out


def cache(config: CacheConfig) -> Path:
    """Compute the reference log-probabilities of a dataset and return the cache's folder."""
    check_out(config.out)
    folder = resolve_model(config.model)
    numerics = Numerics.of(config.marked(Effect.NUMBERS), choose_dtype(config.dtype))
    numerics.check()
    check_adapter(folder)
    records = read_kept_records(config.data, config.images)
    scoring = Scoring(
        folder,
        config.cells,
        config.rejected_scoring,
        numerics,
        config.batch_size,
        config.max_length,
    )
    processor = scoring.model.processor
    rows = check_rows(
        records,
        processor,
        cells=config.cells,
        max_length=config.max_length,
        vocabulary=Vocabulary(processor, scoring.model.config),
    )
    return build_cache(records, scoring, config.out, shard_size=config.shard_size, rows=rows)
