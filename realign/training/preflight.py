"""Checks and estimates of a run before any weight is loaded: rows, steps, trained parts, memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from realign.config import TrainConfig
from realign.errors import RefusedError
from realign.modeling.acceleration import quantized_weights
from realign.modeling.lengths import position_limit
from realign.modeling.memory import Footprint, footprint, size
from realign.modeling.memory_forecast import micro_step_bytes
from realign.modeling.row_checks import check_rows
from realign.modeling.row_index import RowIndex
from realign.modeling.vocabulary import Vocabulary
from realign.runtime.memory import usable_memory
from realign.training.arguments import num_steps, num_warmup_steps
from realign.training.plan import TrainPlan, accumulation_steps, world_size
from realign.training.policy import outline_policy
from realign.training.sharding import check_precision
from realign_kernels import Objective


def preflight(plan: TrainPlan, known: RowIndex | None = None) -> tuple[RowIndex, list[str]]:
    """Check a run's rows and options against its model's configuration and this machine.

    Args:
        plan: The run.
        known: Facts of its rows, if some are known.
    Returns:
        The facts of the rows, and the findings, one line each.
    Raises:
        RefusedError: A row or an option is refused; the message names it, the value and the remedy.
    """
    config, numerics = plan.config, plan.numerics
    # cheap checks first: a wrong option is refused before any row is read
    check_precision(numerics.dtype, autocast=numerics.autocast)
    numerics.check()
    _check_trackers(config.report_to)
    model = outline_policy(plan)
    quantized = quantized_weights(model) if numerics.quantization else set()
    memory_summary, model_bytes = footprint(model, quantized), Footprint.of(model, quantized).total
    _check_memory(model_bytes, memory_summary)
    rows = check_rows(
        plan.records,
        plan.model.processor,
        cells=plan.scoring.cells,
        max_length=config.max_length,
        position_limit=position_limit(plan.model.config),
        vocabulary=Vocabulary(plan.model.processor, plan.model.config),
        known=known,
    )
    return rows, [
        *_say_missing_images(rows, plan.objective),
        _say_rows(rows),
        _say_steps(config, len(rows.rows)),
        memory_summary,
        *_say_memory(plan, rows, model_bytes),
    ]


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know or that are not installed."""
    # transformers never looks for flyte
    available = {*get_available_reporting_integrations(), "flyte"}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RefusedError(
                f"train.report_to must name trackers of {', '.join(INTEGRATION_TO_CALLBACK)}, got "
                f"{name!r}. Name one of them."
            )
        if name not in available:
            raise RefusedError(
                f"train.report_to must name trackers that are installed, got {name!r}. Install its "
                f"package, for example with `pip install {name.replace('_', '-')}`."
            )


def _say_missing_images(rows: RowIndex, objective: Objective) -> Iterator[str]:
    """Yield a line on the pairs without a retrieved image; refuse an objective with an image term
    if no pair has one.
    """
    num_rows = len(rows.rows)
    missing = sum(not row.rejected_images for row in rows.rows)
    if not missing or objective.num_cells < 3:
        return
    if missing == num_rows:
        raise RefusedError(
            f"data must have retrieved images for this objective, got none in {num_rows} rows. "
            "Fill rejected_images (retrieved_image in the authors' JSON), or pass --objective dpo."
        )
    yield f"{missing} of {num_rows} rows have no retrieved image; their image term is dropped"


def _say_rows(rows: RowIndex) -> str:
    images, tokens = sorted(rows.image_tokens), rows.tokens
    of_images = f"; images of {_range(images)} tokens" if images else "; no images"
    return (
        f"{len(tokens):,} pairs; sequences of {_range(tokens)} tokens, "
        f"median {statistics.median_low(tokens):,}{of_images}"
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _say_steps(config: TrainConfig, num_records: int) -> str:
    factors = f"{config.batch_size} x {accumulation_steps(config)} accumulated"
    factors += f" x {world_size()} processes" if world_size() > 1 else ""
    pairs, steps = config.pairs_per_step, num_steps(config, num_records)
    text = (
        f"{pairs:,} pairs per step ({factors}); {steps:,} {'step' if steps == 1 else 'steps'}, "
        f"{num_warmup_steps(config, num_records):,} of them warm-up"
    )
    if pairs > num_records:
        text += f"; the dataset has only {num_records:,} pairs, fewer than a step"
    return text


def _check_memory(model_bytes: int, memory_summary: str) -> None:
    """Refuse weights, gradients and optimizer state that are larger than the memory."""
    if _is_sharded():
        return
    where, available = _device_memory()
    if model_bytes > available:
        raise RefusedError(
            f"training must fit into {size(available)} of {where}, got {memory_summary}. Use "
            "lora (with quantization: nf4 if necessary), or shard over more processes."
        )


def _say_memory(plan: TrainPlan, rows: RowIndex, model_bytes: int) -> Iterator[str]:
    config = plan.config
    activations = micro_step_bytes(
        plan.model.config,
        torch.bfloat16 if plan.numerics.autocast else plan.numerics.dtype,
        tokens=config.batch_size * rows.cells * max(rows.tokens),
        is_checkpointed=config.gradient_checkpointing,
    )
    if activations is None:
        return
    where, available = _device_memory()
    needed = model_bytes + activations
    verdict = ""
    if not _is_sharded():
        verdict = f"; {where} has {size(available)}"
        if needed > available:
            advice = [
                *(["gradient_checkpointing"] if not config.gradient_checkpointing else []),
                *(["a smaller batch_size"] if config.batch_size > 1 else []),
            ]
            verdict += ", which may be too little"
            verdict += f": try {' or '.join(advice)}" if advice else ""
    yield (
        f"estimate: at most {size(activations)} of activations for a micro-batch of the longest "
        f"rows, {size(needed)} in all{verdict}"
    )


def _is_sharded() -> bool:
    """Return whether a launcher splits weights and optimizer over processes."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
    return any(os.environ.get(name, "false").lower() in ("true", "1") for name in names)


def _device_memory() -> tuple[str, int]:
    """Return the name of the training device, and its memory in bytes."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return "this machine", usable_memory()
