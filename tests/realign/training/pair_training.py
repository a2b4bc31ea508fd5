"""A training run on the embedded model that remembers its gradients; and, run as a script, one
process of several that train together.

    python pair_training.py CASES.json: {"folder": ..., "engines": {"ddp": {name: options}, ...}}

with RANK, WORLD_SIZE and so on set as torchrun sets them.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback

from realign.data.formats.parquet import read_parquet, write_parquet
from realign.demo.run import MODEL
from realign.modeling.adapters import add_adapter
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import every_rank_loads, load_model
from realign.modeling.processors import load_processor
from realign.training.policy import checkpoint_activations
from realign.training.trainer import RDPOConfig, RDPOTrainer
from tests.realign.conftest import make_records

REFERENCE = "reference.safetensors"
# nats between policy and reference; where both are equal, the signs of margins are rounding
DISTANCE = 0.1


@dataclasses.dataclass
class Run:
    """The observations of one process in a run."""

    trainer: RDPOTrainer
    gradients: dict[str, torch.Tensor]  # "step/parameter", before any clipping
    weights: dict[str, torch.Tensor]
    ids: list[list[str]]  # of every micro-batch
    lines: list[dict[str, float]]


class Watch(TrainerCallback):
    """Keeps gradients as the optimizer would see them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Take them."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"{state.global_step}/{name}"] = whole(parameter.grad)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, of all ranks' shards where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def write_pairs(
    folder: Path,
    count: int,
    *,
    without_retrieved: Sequence[int] = (),
    without_images: Sequence[int] = (),
) -> list[str]:
    """Write drawn pairs and the policy's log-probabilities for :func:`run`; return their ids.

    Args:
        folder: Where.
        count: How many.
        without_retrieved: Which have no retrieved image.
        without_images: Which are text only.
    """
    rows = make_records(count)
    for index in (*without_retrieved, *without_images):
        rows[index] = dataclasses.replace(rows[index], rejected_images=())
    for index in without_images:
        rows[index] = dataclasses.replace(rows[index], images=())
    write_parquet(rows, folder / "pairs.parquet")
    model = load_model(MODEL, torch.float32)
    with torch.no_grad():
        batch = PreferenceCollator(load_processor(MODEL), cells=3, shared_prefix=True)(rows)
        del batch["ids"]
        logps = model(**batch).logps.double()
    save_file(
        {row.key: logps[:, index].contiguous() for index, row in enumerate(rows)},
        folder / REFERENCE,
    )
    return [row.id for row in rows]


def run(
    folder: Path, name: str, *, lora=False, tied=True, checkpointing=False, resume=None, save=False,
    is_own_reference=False, **options,
) -> Run:  # fmt: skip
    """Train on ``folder/pairs.parquet`` with SGD, so that weights differ as gradients do.

    The reference is another model's, ``DISTANCE`` away, unless ``is_own_reference``.
    """
    watch = Watch()
    args = RDPOConfig(
        **{
            "output_dir": str(folder / name), "report_to": "none", "disable_tqdm": True,
            "use_cpu": os.environ.get("ACCELERATE_USE_FSDP") != "true",
            "dataloader_pin_memory": False, "num_train_epochs": 1, "optim": "sgd",
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
            "logging_steps": 1, "save_strategy": "no", "ddp_timeout": 60,
            "check_first_step": is_own_reference, **options,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = load_model(MODEL, torch.float32)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    if lora:
        model = add_adapter(model, rank=4, alpha=8, targets="all-linear", freeze_vision=True)
    if checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    reference = load_file(folder / REFERENCE)
    if not is_own_reference:
        generator = torch.Generator().manual_seed(0)
        for logps in reference.values():
            logps += torch.randn(logps.shape, generator=generator) * DISTANCE
    trainer = RDPOTrainer(
        model, args, read_parquet(folder / "pairs.parquet"), load_processor(MODEL), reference,
        callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    ids = []
    compute_loss = trainer.compute_loss

    def seen(model, inputs, *args, **kwargs):
        ids.append(inputs["ids"])
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = seen
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    if save:
        trainer.save_model(str(folder / save))
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return Run(trainer, watch.gradients, weights, ids, lines)


def shard_on_the_cpu() -> None:
    """Have accelerate run FSDP2 on gloo.

    It turns FSDP on for accelerators alone (AcceleratorState lists MULTI_GPU and others, not
    MULTI_CPU). Told that this is one, it does on the CPU all that it does on a GPU.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        # what `accelerate launch` sets for recipes/accelerate/fsdp2.yaml
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    begin = PartialState.__init__
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.__init__ = lambda self, cpu=False, **kwargs: begin(self, False, **kwargs)


def main(cases: Path) -> None:
    """Train every run, and write what this rank saw of it."""
    torch.set_num_threads(1)
    gc.freeze()  # no run need search what was imported for garbage
    plan = json.loads(cases.read_text())
    folder, rank = Path(plan["folder"]), os.environ["RANK"]
    for engine, runs in plan["engines"].items():
        if engine == "fsdp2":
            shard_on_the_cpu()
            with every_rank_loads():
                reference = load_model(MODEL, torch.float32)
            weights = {name: whole(parameter) for name, parameter in reference.named_parameters()}
            save_file(weights, folder / f"reference-model.{rank}.safetensors")
        for name, options in runs.items():
            seen = run(folder, name, **options)
            save_file(seen.gradients, folder / f"{name}.gradients.{rank}.safetensors")
            save_file(seen.weights, folder / f"{name}.weights.{rank}.safetensors")
            log = {
                "ids": seen.ids,
                "lines": seen.lines,
                "model": type(seen.trainer.model_wrapped).__name__,
            }
            (folder / f"{name}.{rank}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
