"""The verb ``realign train``: dataset, cache and VLM in; checkpoint and metrics out; continued
after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PrinterCallback, set_seed

from realign.cache import Identity, build_cache, read_cache, reference_identity
from realign.check.rows import announce_missing_images, check_rows
from realign.checkpoints import publish
from realign.config import TrainConfig
from realign.dataset import read_kept_records
from realign.errors import RefusedError
from realign.files import write_text
from realign.footprint import footprint
from realign.lora import add_adapter
from realign.model_card import adapter_card
from realign.modeling import (
    adapter_base,
    choose_dtype,
    is_adapter,
    lasting_name,
    load_model,
    load_processor,
    quiet_peft,
    resolve_model,
)
from realign.objectives import make_objective
from realign.progress import announce
from realign.records import Record
from realign.run_folder import check_out, claim, is_claimed
from realign.trainer import (
    LogLastStep,
    MetricsFile,
    RDPOConfig,
    RDPOTrainer,
    ShowProgress,
)
from realign_kernels import Objective


def train(config: TrainConfig) -> Path:
    """Train and return the checkpoint's folder. The same call after a kill continues and ends the
    same.

    Raises:
        RefusedError: Bad rows, a cache of something else, or an output folder that holds another
            run.
    """
    check_out(config.out)
    folder = resolve_model(config.model)
    _check_support(config, folder)
    objective = _objective(config)
    cells = max(objective.num_cells, 3)  # one cache serves dpo, rdpo and mdpo
    records = read_kept_records(config.data, config.images)
    processor = load_processor(folder)
    check_rows(records, processor, cells=cells, max_length=config.max_length)
    identity = reference_identity(
        folder, cells=cells, rejected_scoring=config.rejected_scoring, dtype=_dtype(config)
    )
    checkpoint = config.out / "checkpoint"
    rows = [_RowSummary.of(record) for record in records]  # once: it may read them from the disk
    what = {
        "config": config.model_dump(
            mode="json",
            # what the result does not depend on, and what is here by its content
            exclude={"out", "model", "data", "images", "cache", "report_to", "max_length"},
        ),
        "model": identity["semantics"]["files"],
        "rows": [row.key for row in rows],
    }
    labels = {"rows": [f"row {row.id}" for row in rows]}
    if is_claimed(config.out, "train", what, labels) and checkpoint.is_dir():
        shutil.rmtree(config.out / "steps", ignore_errors=True)  # of a run killed at its very end
        return checkpoint
    announce_missing_images(sum(not row.has_retrieved for row in rows), len(rows), objective)
    # its own cache is known by its content, so the folder stays free while the model may be refused
    reference = (
        read_cache(config.cache, records, identity)
        if config.cache
        else _build_reference(config, folder, records, identity)
    )

    set_seed(config.seed)
    model = load_model(
        folder, _dtype(config), trainable_adapter=True, name=lasting_name(config.model)
    )
    if config.lora:
        model = add_adapter(
            model,
            rank=config.lora.r,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            freeze_vision=config.freeze_vision,
        )
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
        model.enable_input_require_grads()
    claim(config.out, "train", what, labels)
    trainer = RDPOTrainer(
        model,
        _arguments(config, len(records)),
        records,
        processor,
        reference,
        callbacks=[LogLastStep(), MetricsFile(config.out / "metrics.jsonl"), ShowProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    announce(footprint(model))
    unfinished = config.out / ".checkpoint.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    with quiet_peft():
        trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
        trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        if is_adapter(unfinished):
            write_text(
                unfinished / "README.md",
                adapter_card(config, adapter_base(unfinished), len(records)),
            )
        publish(unfinished, checkpoint)
        shutil.rmtree(config.out / "steps")
    return checkpoint


class _RowSummary(NamedTuple):
    """What a run needs of every row before it starts."""

    id: str
    key: str
    has_retrieved: bool

    @classmethod
    def of(cls, record: Record) -> _RowSummary:
        return cls(record.id, record.key, bool(record.rejected_images))


def _check_support(config: TrainConfig, folder: Path) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RefusedError("train must run in one process for now, got WORLD_SIZE > 1. Drop it.")
    if config.lora and is_adapter(folder):
        raise RefusedError(
            f"train.lora must not be set when model {folder} is an adapter already: it would be "
            "overwritten. Drop train.lora to train that adapter on, or merge it first."
        )


def _dtype(config: TrainConfig) -> torch.dtype:
    """Full fine-tuning needs float32 weights: updates of 1e-5 vanish in bfloat16."""
    if config.dtype == "auto" and not config.lora:
        return torch.float32
    return choose_dtype(config.dtype)


def _objective(config: TrainConfig) -> Objective:
    return make_objective(
        config.objective,
        beta=config.beta,
        image_beta=config.image_beta,
        image_weight=config.image_weight,
        nll_weight=config.nll_weight,
    )


def _build_reference(
    config: TrainConfig, folder: Path, records: Sequence[Record], identity: Identity
) -> dict[str, Tensor]:
    root = config.out / "cache"
    build_cache(
        records,
        folder,
        root,
        cells=identity["semantics"]["cells"],
        rejected_scoring=config.rejected_scoring,
        dtype=_dtype(config),
        batch_size=max(config.batch_size, 4),
        shard_size=1024,
        max_length=config.max_length,
    )
    return read_cache(root, records, identity)


def _arguments(config: TrainConfig, num_records: int) -> RDPOConfig:
    pairs_per_step = (
        config.batch_size * config.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    )
    steps = max(1, round(num_records / pairs_per_step * config.epochs))
    arguments = RDPOConfig(
        output_dir=str(config.out / "steps"),
        objective=config.objective,
        beta=config.beta,
        image_beta=config.image_beta,
        image_weight=config.image_weight,
        nll_weight=config.nll_weight,
        rejected_scoring=config.rejected_scoring,
        freeze_vision=config.freeze_vision,
        max_length=config.max_length,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=False,  # the weights' own dtype; no second copy
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="steps",
        logging_first_step=True,
        logging_steps=config.logging_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        report_to=config.report_to or "none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would cut cell-major batches
    return arguments
