"""One process of two that take a step of DPO under FSDP2, with TRL's function and with the patch.

    python sharded_dpo.py FOLDER

with RANK, WORLD_SIZE and so on set as torchrun sets them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from realign.integrations.trl import patch_trl
from tests.realign.integrations.trl.stock import (
    policy_model,
    reference_model,
    stock,
    untied_model,
)
from tests.realign.training.pair_training import shard_on_the_cpu, whole

# Whether the head is tied.  If not, it is sharded by itself: TRL finds a DTensor, and gathers it.
CASES = {"tied": True, "untied": False}


class Watch(TrainerCallback):
    """Keeps gradients as the optimizer would see them, of all ranks' shards."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Take them."""
        self.gradients = {
            name: whole(parameter.grad)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def take_step(
    folder: Path, is_tied: bool, **options: object
) -> tuple[dict[str, Tensor], float, DPOTrainer]:
    """Return gradients and loss of four pairs, and the trainer."""
    policy, reference = policy_model(), reference_model()
    for model in () if is_tied else (policy, reference):
        untied_model(model)
    training = {"max_grad_norm": 0.0, "gradient_checkpointing": True, **options}
    trainer = stock(folder, model=policy, ref_model=reference, training=training)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch.gradients, trainer.state.log_history[0]["loss"], trainer


def main(folder: Path) -> None:
    """Take the steps, and write what this rank saw of them."""
    torch.set_num_threads(1)
    shard_on_the_cpu()
    rank = os.environ["RANK"]
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    options = {"per_device_train_batch_size": 2, "use_cpu": False}
    for case, is_tied in CASES.items():
        unpatched, stock_loss, _ = take_step(folder, is_tied, **options)
        with patch_trl() as patch:
            found, loss, trainer = take_step(folder, is_tied, **options)
        save_file(unpatched, folder / f"{case}.stock.{rank}.safetensors")
        save_file(found, folder / f"{case}.patched.{rank}.safetensors")
        report = {
            "loss": loss,
            "stock_loss": stock_loss,
            "calls": [patch.calls, patch.passed_on],
            "model": type(trainer.model_wrapped).__name__,
        }
        (folder / f"{case}.{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
