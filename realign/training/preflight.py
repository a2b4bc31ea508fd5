"""What a training run would be, found out and said before any weight is loaded: rows, steps, what
trains, memory, cache.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from realign.config import TrainConfig
from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.acceleration import quantized_weights
from realign.modeling.lengths import RowLengths, position_limit
from realign.modeling.loading import load_model_config
from realign.modeling.memory import Footprint, footprint, micro_step_bytes, size
from realign.modeling.row_checks import CheckedRows, check_rows
from realign.runtime.memory import usable_memory
from realign.runtime.progress import announce
from realign.training.arguments import num_steps, num_warmup_steps, pairs_per_step, world_size
from realign.training.policy import numerics_of, outline_policy
from realign_kernels import Objective


def announce_missing_images(without: int, num_rows: int, objective: Objective) -> None:
    """Say how many pairs have no image term; refuse an objective with one when none has it.

    Args:
        without: How many rows have no retrieved image.
        num_rows: How many rows there are.
        objective: What will be trained.
    Raises:
        RefusedError: No row has a retrieved image and the objective needs one.
    """
    if not without or objective.num_cells < 3:
        return
    if without == num_rows:
        raise RefusedError(
            f"data must have retrieved images for this objective, got none in {num_rows} rows. "
            "Fill rejected_images (retrieved_image in JSON), or pass --objective dpo."
        )
    announce(f"{without} of {num_rows} rows have no retrieved image; their image term is dropped")


def preflight(
    config: TrainConfig,
    folder: Path,
    records: Sequence[Record],
    processor: Any,
    *,
    cells: int,
    checked: CheckedRows | None = None,
) -> list[str]:
    """Check a run's rows and options against its model's configuration and this machine.

    Args:
        config: The run.
        folder: The model's, from :func:`realign.modeling.folder.resolve_model`.
        records: The rows.
        processor: The model's.
        cells: How many sequences a pair is.
        checked: Where it is kept that the rows were good.
    Returns:
        The findings, a line each.
    Raises:
        RefusedError: Naming the row or option, the value and the remedy.
    """
    model_config = load_model_config(folder)
    # cheap first: a wrong option need not wait for every row
    numerics = numerics_of(config)
    numerics.check()
    dtype = torch.bfloat16 if config.autocast else numerics.dtype
    model = outline_policy(config, folder)
    quantized = quantized_weights(model) if config.quantization else set()
    said, held = footprint(model, quantized), Footprint.of(model, quantized).total
    _check_memory(held, said)
    lengths = check_rows(
        records,
        processor,
        cells=cells,
        max_length=config.max_length,
        position_limit=position_limit(model_config),
        checked=checked,
    )
    return [
        _say_rows(lengths),
        _say_steps(config, len(records)),
        said,
        *_say_memory(config, model_config, lengths, dtype, held),
    ]


def _say_rows(lengths: RowLengths) -> str:
    images = sorted(lengths.images)
    of_images = f"; images of {_range(images)} tokens" if images else "; no images"
    return (
        f"{len(lengths.rows):,} pairs; sequences of {_range(lengths.rows)} tokens, "
        f"median {statistics.median_low(lengths.rows):,}{of_images}"
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _say_steps(config: TrainConfig, num_records: int) -> str:
    factors = f"{config.batch_size} x {config.accumulation} accumulated"
    factors += f" x {world_size()} processes" if world_size() > 1 else ""
    pairs, steps = pairs_per_step(config), num_steps(config, num_records)
    text = (
        f"{pairs:,} pairs a step ({factors}); {steps:,} {'step' if steps == 1 else 'steps'}, "
        f"{num_warmup_steps(config, num_records):,} of them warm-up"
    )
    if pairs > num_records:
        text += f"; a step asks for more pairs than the {num_records:,} there are"
    return text


def _check_memory(held: int, said: str) -> None:
    """What weights, gradients and optimizer state exceed cannot hold them."""
    if _is_sharded():
        return
    where, available = _device_memory()
    if held > available:
        raise RefusedError(
            f"training must fit into {size(available)} of {where}, got {said}. Use "
            "lora (with quantization: nf4 if need be), or shard over more processes."
        )


def _say_memory(
    config: TrainConfig, model_config: Any, lengths: RowLengths, dtype: torch.dtype, held: int
) -> Iterator[str]:
    activations = micro_step_bytes(
        model_config,
        dtype,
        tokens=config.batch_size * lengths.cells * max(lengths.rows),
        is_checkpointed=config.gradient_checkpointing,
    )
    if activations is None:
        return
    where, available = _device_memory()
    needed = held + activations
    verdict = ""
    if not _is_sharded():
        verdict = f"; {where} has {size(available)}"
        if needed > available:
            advice = [
                *(["gradient_checkpointing"] if not config.gradient_checkpointing else []),
                *(["a smaller batch_size"] if config.batch_size > 1 else []),
            ]
            verdict += ", which may not do" + (f": try {' or '.join(advice)}" if advice else "")
    yield (
        f"estimate: at most {size(activations)} of activations for a micro-step of the longest "
        f"rows, {size(needed)} with the above{verdict}"
    )


def _is_sharded() -> bool:
    """Whether a launcher splits weights and optimizer over processes, so that each holds less."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
    return any(os.environ.get(name, "false").lower() in ("true", "1") for name in names)


def _device_memory() -> tuple[str, int]:
    """What training would run on, and its memory in bytes."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return "this machine", usable_memory()
