"""Trainers of TRL and ours on the same pairs of the drawn world, and what one step of them does."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.step.trl import RdpoCollator
from realign.demo.run import MODEL
from realign.integrations.trl import RdpoTrainer
from realign.integrations.trl.rows import as_record, with_image_bytes
from realign.modeling.collate import PreferenceCollator
from realign.modeling.preference_forward import attach_preference_forward
from realign.modeling.processors import load_processor
from realign_kernels import Objective, Term
from tests.realign.conftest import make_records

QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
}


class Step(NamedTuple):
    """One step of a trainer."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def pairs(count: int = 4, seed: int = 0, **columns: list[Any]) -> datasets.Dataset:
    """Pairs in TRL's columns, with decoded images."""
    images = datasets.List(datasets.Image())
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = {"images": images, "rejected_images": images}
    features |= dict.fromkeys(("prompt", "chosen", "rejected"), turns)
    dataset = datasets.Dataset.from_list(
        [
            {
                "images": [{"bytes": raw, "path": None} for raw in record.images],
                "rejected_images": [{"bytes": raw, "path": None} for raw in record.rejected_images],
                "prompt": list(record.prompt),
                "chosen": [{"role": "assistant", "content": record.chosen}],
                "rejected": [{"role": "assistant", "content": record.rejected}],
            }
            for record in make_records(count, seed)
        ],
        features=datasets.Features(features),
    )
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def config(folder: Path | str, **options: Any) -> DPOConfig:
    """A configuration for the CPU, in float32, without truncation."""
    defaults: dict[str, Any] = {
        **QUIET, "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 1,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_length": None,
        "remove_unused_columns": False, "gradient_checkpointing": False,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    return DPOConfig(**{**defaults, **options})


@cache
def _reference() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()


def reference_model() -> Any:
    """The embedded model."""
    return copy.deepcopy(_reference())


def policy_model() -> Any:
    """The embedded model, moved a little: its margins are not 0."""
    model, generator = reference_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 2e-3
    return model


def untied_model(model: Any = None) -> Any:
    """A model, the embedded one where none is given, with an output projection of its own: an
    adapter of it is its own, too.
    """
    model = model or reference_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return model


def lora(*targets: str) -> LoraConfig:
    """An adapter whose two factors are both random: it changes what the base computes."""
    return LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False)


@cache
def cached_reference(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities of the reference model, by the key of a row, three cells each."""
    model = reference_model()
    attach_preference_forward(model)
    records = [as_record(row) for row in with_image_bytes(pairs(count, seed))]
    batch = PreferenceCollator(load_processor(MODEL), 3)(records)
    del batch["ids"]
    with torch.no_grad():
        logps = model(**batch, objective=Objective.rdpo()).logps
    return {record.key: logps[:, pair].double() for pair, record in enumerate(records)}


def text_half(link: str = "logsigmoid") -> Objective:
    """DPO alone, as TRL's trainer has it."""
    return Objective((Term((1, -1), beta=0.1, link=link),))


def stock(folder: Path, *, image_pairs: bool = False, **options: Any) -> DPOTrainer:
    """TRL's own trainer; with image pairs it is given both pairs of a row, at weight 2."""
    arguments: dict[str, Any] = {
        "model": policy_model(), "ref_model": reference_model(), "train_dataset": pairs(),
        "processing_class": load_processor(MODEL),
    }  # fmt: skip
    training = options.pop("training", {})
    if image_pairs:
        training = {**training, "loss_weights": [2.0]}
        arguments["data_collator"] = RdpoCollator(load_processor(MODEL), max_length=None)
    return quiet(DPOTrainer(**{**arguments, **options}, args=config(folder, **training)))


def ours(folder: Path, **options: Any) -> RdpoTrainer:
    """Our trainer, its reference live where no other is given."""
    arguments: dict[str, Any] = {
        "model": policy_model(), "train_dataset": pairs(), "processing_class": load_processor(MODEL)
    }  # fmt: skip
    if options.get("reference") is None and "peft_config" not in options:
        arguments["ref_model"] = reference_model()
    training = options.pop("training", {})
    return quiet(RdpoTrainer(**{**arguments, **options}, args=config(folder, **training)))


def quiet(trainer: Any) -> Any:
    """The trainer, which prints no log lines."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def step(trainer: Any) -> Step:
    """Loss, gradients and metrics of a trainer's first four rows."""
    rows = [dict(trainer.train_dataset[index]) for index in range(4)]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._total_train_tokens = 0
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Step(loss.item(), gradients(trainer.model), metrics)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name to gradient."""
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative L2 distance over all parameters; infinite where not the same have a gradient."""
    if found.keys() != expected.keys():
        return float("inf")
    off = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    norm = sum(float(expected[name].double().square().sum()) for name in expected)
    return (off / norm) ** 0.5
