"""A script: train the embedded model on two CPU processes, with something wrong on one of them,
and print how each of them ended. It forks after the imports.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback

from realign.data.dataset import read_records
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.trainer import RDPOConfig, RDPOTrainer

torch.set_num_threads(1)
Change = Callable[[RDPOTrainer, int], None]


def two_ranks(
    given: dict[str, str], name: str, change: Change | None = None, seconds: float = 100
) -> list[int | str]:
    """Fork two ranks, and return the exit code or the error message of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(given["folder"]) / name
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            try:
                (folder / f"error{rank}.txt").unlink(missing_ok=True)
                run(given, folder, rank, port, change)
                os._exit(0)
            except SystemExit as stop:
                os._exit(int(stop.code or 0))
            except BaseException as error:
                (folder / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
        children.append(child)
    alarms = [threading.Timer(seconds, os.kill, (child, signal.SIGKILL)) for child in children]
    for alarm in alarms:
        alarm.start()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for alarm in alarms:
        alarm.cancel()
    paths = [folder / f"error{rank}.txt" for rank in range(2)]
    return [
        path.read_text() if path.exists() else code for path, code in zip(paths, codes, strict=True)
    ]


def run(given: dict[str, str], folder: Path, rank: int, port: int, change: Change | None) -> None:
    """Train as one of the two."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1",
    }
    model_dir = Path(given["model"])
    args = RDPOConfig(
        output_dir=str(folder / "steps"), report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=1,
        learning_rate=1e-3, logging_steps=1, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    rows = read_records(Path(given["data"]), None)
    stored = load_file(given["reference"])
    reference = {row.key: stored[row.id] for row in rows}
    if change is off_reference and rank == 0:
        reference = {key: logps + torch.tensor([0.1, 0, 0]) for key, logps in reference.items()}
    model = load_model(model_dir, torch.float32)
    trainer = RDPOTrainer(model, args, rows, load_processor(model_dir), reference)
    trainer.remove_callback(PrinterCallback)
    if change and change is not off_reference:
        change(trainer, rank)
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())


def off_reference(trainer: RDPOTrainer, rank: int) -> None:
    """Done to the reference."""


def bad_loss(trainer: RDPOTrainer, rank: int) -> None:
    """NaN in an image of rank 1 in the second step."""
    collate, calls = trainer.data_collator, []

    def spoiled(rows: Any) -> Any:
        batch = collate(rows)
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            batch["pixel_values"][0, 0, 0, 0] = math.nan
        return batch

    trainer.data_collator = spoiled


def bad_gradient(trainer: RDPOTrainer, rank: int) -> None:
    """Infinity in a gradient of rank 0 in the second step."""
    calls: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.inf if rank == 0 and len(calls) == 4 else gradient

    trainer.model.lm_head.weight.register_hook(spoil)


class Ask(TrainerCallback):
    """SIGTERM to this process, in the middle of the second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send it."""
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def ask_one(trainer: RDPOTrainer, rank: int) -> None:
    """Rank 1 alone is asked to end."""
    if rank == 1:
        trainer.callback_handler.callbacks.insert(0, Ask())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def main() -> None:
    """Arguments: a JSON object with model, data, reference and folder."""
    given = json.loads(sys.argv[1])
    result: dict[str, Any] = {
        name: two_ranks(given, name, change)
        for name, change in {
            "whole": None,
            "off reference": off_reference,
            "bad loss": bad_loss,
            "bad gradient": bad_gradient,
            "asked": ask_one,
        }.items()
    }
    steps = Path(given["folder"]) / "asked" / "steps"
    result["saved when asked"] = sorted(path.name for path in steps.iterdir())
    result["resumed"] = two_ranks(given, "asked")
    whole, resumed = (
        {
            str(path.relative_to(place)): path.read_bytes()
            for path in place.rglob("*")
            if path.is_file()
        }
        for place in (
            Path(given["folder"]) / n / "steps" / "checkpoint-4" for n in ("whole", "asked")
        )
    )
    result["files"] = sorted(whole)
    result["differ"] = sorted(
        n for n in whole.keys() | resumed.keys() if whole.get(n) != resumed.get(n)
    )
    print(json.dumps(result))  # noqa: T201 - a script


if __name__ == "__main__":
    main()
