"""A run of RdpoTrainer of which one process writes down what it saw; run as a script, one process
of several that train together.

    python ranks.py FOLDER DATA_PATH

with RANK, WORLD_SIZE and so on set as torchrun sets them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.realign.integrations.trl.stock import ours, pairs

PAIRS, PAIRS_PER_STEP = 8, 4
DATA_PATHS = ("own", "native")


def run(folder: Path, data_path: str) -> None:
    """Train two steps with SGD, so that weights differ as gradients do."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = ours(
        folder / "out",
        train_dataset=pairs(PAIRS),
        data_path=data_path,
        training={
            "per_device_train_batch_size": PAIRS_PER_STEP // num_ranks, "max_steps": 2,
            "per_device_eval_batch_size": PAIRS // num_ranks, "optim": "sgd",
            "learning_rate": 1e-2, "ddp_timeout": 60,
        },
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    lines.append(trainer.evaluate(pairs(PAIRS, 1)))
    name = f"{data_path}.{os.environ.get('RANK', 'alone')}"
    weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    save_file(weights, folder / f"{name}.safetensors")
    kind = type(trainer.model_wrapped).__name__
    (folder / f"{name}.json").write_text(json.dumps({"lines": lines, "model": kind}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in DATA_PATHS:
        run(Path(sys.argv[1]), one)
