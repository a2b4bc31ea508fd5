"""The verb ``realign cache``."""

from __future__ import annotations

from pathlib import Path

from realign.config import CacheConfig
from realign.data.dataset import read_kept_records
from realign.modeling.acceleration import Acceleration
from realign.modeling.folder import resolve_model
from realign.modeling.loading import choose_dtype
from realign.modeling.processors import load_processor
from realign.modeling.row_checks import check_rows
from realign.reference.build import build_cache
from realign.runtime.run_folder import check_out


def cache(config: CacheConfig) -> Path:
    """Compute the reference log-probabilities of a dataset. Returns the cache's folder."""
    check_out(config.out)
    folder = resolve_model(config.model)
    dtype = choose_dtype(config.dtype)
    Acceleration(config.attention, config.liger, config.quantization, config.autocast).check(dtype)
    records = read_kept_records(config.data, config.images)
    check_rows(records, load_processor(folder), cells=config.cells, max_length=config.max_length)
    return build_cache(
        records,
        folder,
        config.out,
        cells=config.cells,
        rejected_scoring=config.rejected_scoring,
        dtype=dtype,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        max_length=config.max_length,
        shared_prefix=config.shared_prefix,
        attention=config.attention,
        liger=config.liger,
        quantization=config.quantization,
        autocast=config.autocast,
    )
