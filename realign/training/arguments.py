"""What transformers.Trainer is told for the options of ``realign train``."""

from __future__ import annotations

import math
import os

import torch

from realign.config import TrainConfig
from realign.training.trainer import RDPOConfig

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def world_size() -> int:
    """Processes that train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def pairs_per_step(config: TrainConfig) -> int:
    """Pairs behind one update of the weights, over all processes."""
    return config.batch_size * config.accumulation * world_size()


def num_steps(config: TrainConfig, num_records: int) -> int:
    """Updates of a run, counted as Trainer counts them: the last one of an epoch may be smaller."""
    micro_steps = math.ceil(num_records / (config.batch_size * world_size()))
    return math.ceil(config.epochs * math.ceil(micro_steps / config.accumulation))


def num_warmup_steps(config: TrainConfig, num_records: int) -> int:
    """Updates with a rising learning rate."""
    return int(config.warmup_ratio * num_steps(config, num_records))


def training_arguments(config: TrainConfig, num_records: int) -> RDPOConfig:
    """The arguments of a run on ``num_records`` pairs."""
    arguments = RDPOConfig(
        output_dir=str(config.out / "steps"),
        objective=config.objective,
        beta=config.beta,
        image_beta=config.image_beta,
        image_weight=config.image_weight,
        nll_weight=config.nll_weight,
        rejected_scoring=config.rejected_scoring,
        freeze_vision=config.freeze_vision,
        freeze_projector=config.freeze_projector,
        freeze_language=config.freeze_language,
        projector_learning_rate=config.projector_learning_rate,
        shared_prefix=config.shared_prefix,
        max_length=config.max_length,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=num_warmup_steps(config, num_records),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.autocast,  # else the weights' own dtype
        check_first_step=config.check_first_step,
        dataloader_num_workers=config.workers,
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
