"""Training steps of one scheme in a process of its own, when :mod:`benchmarks.step` asks for them.

``python -m benchmarks.step.worker JOB`` writes a JSON line when it is ready, or one that says why
the job is unavailable here. For each number that it then reads, it trains that many steps and
writes a line about them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# set before the libraries that read them are imported
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # TRL's trainers send some
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from benchmarks.step.profile import StepProfile
from benchmarks.step.setup import Job, build_model, build_processor, build_records
from realign.errors import RefusedError

Send = Callable[[dict[str, Any]], None]


class Memory:
    """The peak memory of a process: allocated memory on a GPU, else resident memory."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        self.before = 0 if self.is_gpu else _status("VmRSS")  # libraries

    def reset(self) -> None:
        """Forget earlier peaks."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak in bytes, without libraries."""
        return torch.cuda.max_memory_allocated() if self.is_gpu else _status("VmHWM") - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class Turns(TrainerCallback):
    """Callback that makes the trainer wait for its turns and times its steps."""

    def __init__(
        self,
        trainer: Trainer,
        memory: Memory,
        send: Send,
        read: Callable[[], str],
        profile: StepProfile | None,
    ) -> None:
        self.memory, self.send, self.read = memory, send, read
        self.profile = profile  # of the last step
        self.left = 0
        self.losses: list[torch.Tensor] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads, for machines where others compute too
        step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.losses.append(loss := step(*args, **kwargs).detach())
            return loss

        trainer.training_step = training_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Wait for a turn."""
        if not self.left:
            self.left = int(self.read())
            self.memory.reset()
        self._synchronize()
        if self.profile and state.global_step == args.max_steps - 1:
            self.profile.start()
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Report a turn that is over."""
        self._synchronize()
        if self.profile and state.global_step == args.max_steps:
            self.profile.stop()
        self.seconds.append(time.perf_counter() - self.started[0])
        self.cpu_seconds.append(time.process_time() - self.started[1])
        self.left -= 1
        if self.left:
            return
        peak = self.memory.peak()
        losses = [loss.item() for loss in self.losses]
        self.losses.clear()
        gc.collect()
        if self.memory.is_gpu:
            torch.cuda.empty_cache()  # the others need the room
        times = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        self.send({**times, "losses": losses, "peak_bytes": peak})
        self.seconds, self.cpu_seconds = [], []

    def _synchronize(self) -> None:
        if self.memory.is_gpu:
            torch.cuda.synchronize()


def make_trainer(job: Job) -> tuple[Trainer, dict[str, Any]]:
    """Return a job's trainer, and the facts that are known before its first step."""
    processor, records = build_processor(job.step_shape), build_records(job)
    model = build_model(job)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found: dict[str, Any] = {"parameters": model.num_parameters(), "weights_bytes": weights}
    trainer, known = scheme_module(job).make_trainer(job, model, processor, records)
    found |= known
    found["trainable"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rows = [trainer.train_dataset[index] for index in range(job.pairs)]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trainer.data_collator([dict(row) if isinstance(row, dict) else row for row in rows])
        times.append(time.perf_counter() - started)
    return trainer, found | {"collate_seconds_a_pair": min(times) / job.pairs}


def main() -> None:
    """Train in turns until all steps are done."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision("highest")
    stream, sys.stdout = sys.stdout, sys.stderr  # libraries print
    scheme_module(job)
    if job.mode == "lora":
        import_module("peft")
    memory = Memory(job.device)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=stream, flush=True)

    try:
        trainer, found = make_trainer(job)
    except RefusedError as error:
        if not job.liger:
            raise
        # Liger does not support the model.
        send({"unavailable": str(error)})
        return
    profile = StepProfile(Path(job.profile), job.device) if job.profile else None
    trainer.add_callback(Turns(trainer, memory, send, sys.stdin.readline, profile))
    send(found)
    trainer.train()


def scheme_module(job: Job) -> ModuleType:
    """Return the module of a job's scheme, which imports its libraries."""
    return import_module(f"benchmarks.step.{job.scheme}")


if __name__ == "__main__":
    main()
