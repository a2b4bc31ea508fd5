"""TRL's DPOTrainer on the embedded model and the drawn world, as its users would make it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PrinterCallback
from trl import DPOConfig, DPOTrainer

from realign.data.records import Record
from realign.demo.run import MODEL
from realign.modeling.processors import load_processor

QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
}


def as_dataset(records: Sequence[Record]) -> datasets.Dataset:
    """The columns that TRL reads of pairs."""
    return datasets.Dataset.from_list(
        [
            {
                "images": [{"bytes": raw, "path": None} for raw in record.images],
                "prompt": list(record.prompt),
                "chosen": [{"role": "assistant", "content": record.chosen}],
                "rejected": [{"role": "assistant", "content": record.rejected}],
            }
            for record in records
        ]
    ).cast_column("images", datasets.List(datasets.Image()))


def policy_and_reference(distance: float = 2e-3) -> tuple[Any, Any]:
    """The embedded model, moved off itself by noise, and the embedded model."""
    reference = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * distance)
    return policy, reference.eval()


def make_trainer(
    folder: Path,
    records: Sequence[Record],
    models: tuple[Any, Any] | None = None,
    pairs: int = 4,
    peft_config: Any = None,
    **options: Any,
) -> DPOTrainer:
    """The stock trainer of some pairs, ``pairs`` a step."""
    policy, reference = models or policy_and_reference()
    args = DPOConfig(
        **{
            **QUIET, "output_dir": str(folder), "max_length": None, "max_steps": 1,
            "per_device_train_batch_size": pairs, "learning_rate": 1e-4, **options,
        }
    )  # fmt: skip
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=args,
        train_dataset=as_dataset(records),
        processing_class=load_processor(MODEL),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradient of every parameter that has one."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative L2 over all parameters."""
    assert found.keys() == expected.keys()
    off = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((off / sum(grad.double().square().sum() for grad in expected.values())).sqrt())
