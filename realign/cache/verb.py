"""The verb ``realign cache``."""

from __future__ import annotations

from pathlib import Path

from realign.acceleration import Acceleration
from realign.cache.build import build_cache
from realign.check.rows import check_rows
from realign.config import CacheConfig
from realign.dataset import read_kept_records
from realign.modeling import choose_dtype, load_processor, resolve_model
from realign.run_folder import check_out


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
