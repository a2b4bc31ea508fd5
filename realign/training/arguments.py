"""The arguments of transformers.Trainer for the options of ``realign train``."""

from __future__ import annotations

import math
from dataclasses import fields

import torch

from realign.config import TrainConfig
from realign.training.plan import accumulation_steps, world_size
from realign.training.trainer import RDPOConfig

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# options that Trainer has under another name; those with the same name are passed on as they are
_RENAMED = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "workers": "dataloader_num_workers",
    "autocast": "bf16",  # without it, Trainer computes in the dtype of the weights
}
_NOT_PASSED_ON = {"gradient_checkpointing"}  # load_policy enables it


def num_steps(config: TrainConfig, num_records: int) -> int:
    """Return the number of updates of a run, as Trainer counts them: the last update of an epoch
    may have fewer pairs.
    """
    micro_steps = math.ceil(num_records / (config.batch_size * world_size()))
    return math.ceil(config.epochs * math.ceil(micro_steps / accumulation_steps(config)))


def num_warmup_steps(config: TrainConfig, num_records: int) -> int:
    """Return the number of updates with a rising learning rate."""
    return int(config.warmup_ratio * num_steps(config, num_records))


def training_arguments(config: TrainConfig, num_records: int) -> RDPOConfig:
    """Return the arguments of a run on ``num_records`` pairs."""
    known = {argument.name for argument in fields(RDPOConfig)} - _NOT_PASSED_ON
    options = {_RENAMED.get(name, name): value for name, value in config}
    options = {name: value for name, value in options.items() if name in known}
    options |= {
        "gradient_accumulation_steps": accumulation_steps(config),
        "output_dir": str(config.out / "steps"),
        "run_name": config.out.name,  # in trackers
        "lr_scheduler_type": _SCHEDULES[config.schedule],
        "warmup_steps": num_warmup_steps(config, num_records),
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "steps",
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "data_seed": config.seed,
        "report_to": config.report_to or "none",
        "disable_tqdm": True,
    }
    return RDPOConfig(**options)
