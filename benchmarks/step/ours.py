"""The training step of ours: RDPOTrainer with a reference computed beforehand."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from benchmarks.step.compiled import compile_layers
from benchmarks.step.setup import Job, lora_config, training_options
from realign.data.records import Record
from realign.modeling.acceleration import use_liger_layers
from realign.modeling.adapters import quiet_peft
from realign.modeling.collate import PreferenceCollator
from realign.modeling.packing import why_not_shared
from realign.modeling.preference_forward import attach_preference_forward
from realign.training.trainer import RDPOConfig, RDPOTrainer

CELLS = 3


def make_trainer(
    job: Job, model: Any, processor: Any, records: list[Record]
) -> tuple[RDPOTrainer, dict[str, float]]:
    """Return the trainer of a job, and the seconds per pair that its reference took."""
    if job.liger:
        use_liger_layers(model)
    attach_preference_forward(model)
    compute_reference(job, model, processor, records[:1])  # warms up
    started = time.perf_counter()
    reference = compute_reference(job, model, processor, records)
    seconds = (time.perf_counter() - started) / len(records)
    if job.mode == "lora":
        from peft import get_peft_model

        torch.manual_seed(job.seed)
        with quiet_peft():
            model = get_peft_model(model, lora_config(job, model))
        if job.checkpoints:
            model.enable_input_require_grads()
    options = training_options(job)
    if job.compiled:
        compile_layers(model, job.device)
    trainer = RDPOTrainer(model, RDPOConfig(**options), records, processor, reference)
    return trainer, {"cache_seconds_a_pair": seconds}


@torch.inference_mode()
def compute_reference(
    job: Job, model: Any, processor: Any, records: list[Record]
) -> dict[str, Tensor]:
    """Return the log-probabilities of the untrained model, (C,), by ``record.key``."""
    collator = PreferenceCollator(processor, CELLS, shared_prefix=why_not_shared(model) is None)
    found = {}
    for record in records:
        batch = collator([record])
        batch.pop("ids")
        found[record.key] = model(**send_to_device(batch, job.device)).logps[:, 0].cpu().clone()
    return found
