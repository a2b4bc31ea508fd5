"""FSDP2 and ZeRO through the command line: their trained weights against those of one process.

``accelerate launch`` starts ``realign train`` with the presets of ``recipes/accelerate``: with one
process over NCCL, and with two that share the GPU over gloo (:mod:`benchmarks.gpu.rank_process`).
A small random LLaVA is trained for one epoch; then its weights are compared, by the distance
between two results relative to the distance that training has moved them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.gpu.processes import ROOT, run_command
from benchmarks.gpu.session import Cell, Session
from benchmarks.step.setup import Job, build_model, build_processor, build_records
from realign.data.formats.parquet import write_parquet

PAIRS, PAIRS_PER_STEP = 13, 8  # the second step is short: a rank has no pair in its last part
_SHAPES = {"cuda": "small", "cpu": "tiny"}
_SECONDS = {"cuda": 90.0, "cpu": 600.0}  # that one run may take


class Run(NamedTuple):
    """A way to train."""

    name: str
    preset: str | None  # of recipes/accelerate
    processes: int
    dtype: str = "float32"
    compared_with: str = "alone"

    @property
    def bound(self) -> float:
        """Largest distance from the other result, relative to the distance trained."""
        # AdamW turns the rounding of small gradients into steps; DeepSpeed rounds weights twice
        return 1e-2 if self.dtype == "float32" else 0.5


RUNS = (
    Run("alone", None, 1),
    Run("fsdp2, 1 process", "fsdp2", 1),
    Run("fsdp2, 2 processes", "fsdp2", 2),
    Run("alone, bfloat16", None, 1, "bfloat16"),
    Run("zero2, 1 process", "zero2", 1, "bfloat16", "alone, bfloat16"),
    Run("zero2, 2 processes", "zero2", 2, "bfloat16", "zero2, 1 process"),
    Run("zero3, 1 process", "zero3", 1, "bfloat16", "zero2, 1 process"),
    Run("zero3, 2 processes", "zero3", 2, "bfloat16", "zero2, 1 process"),
)


def compare_ranks(session: Session) -> None:
    """Write a cell for every run."""
    with ExitStack() as stack:

        @functools.cache
        def folder() -> Path:
            # made only if some cell is still to be measured
            made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_inputs(made, _SHAPES[session.device.type])
            return made

        @functools.cache
        def train(run: Run) -> Cell | None:
            # once, whether it succeeds or not: several runs are compared with one
            return _train(folder(), run, session)

        for run in RUNS:
            session.add(
                f"ranks/{run.name}",
                lambda run=run: _measure(run, session.device, train, folder),
            )


def write_inputs(folder: Path, shape: str) -> None:
    """Write a model of a shape, and pairs."""
    job = Job("ours", shape, "full", PAIRS, steps=1)
    build_model(job).save_pretrained(folder / "model")
    build_processor(job.step_shape).save_pretrained(folder / "model")
    write_parquet(build_records(job), folder / "pairs.parquet")


def why_not(run: Run, device: torch.device) -> str | None:
    """Return why a run cannot be started here, or None."""
    if run.preset is None or not run.preset.startswith("zero"):
        if run.preset == "fsdp2" and device.type == "cpu" and run.processes == 1:
            return "accelerate shards over GPUs alone; on a CPU only two processes can be compared"
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return "DeepSpeed needs a GPU for this" if device.type == "cpu" else None


def command(folder: Path, run: Run) -> list[str]:
    """Return the command of a run."""
    train = [
        "train", "--model", folder / "model", "--data", folder / "pairs.parquet",
        "--out", folder / run.name, "--set", "train.learning_rate=1e-3",
        "--set", f"train.batch_size={2 // run.processes}",
        "--set", f"train.pairs_per_step={PAIRS_PER_STEP}", "--set", "train.logging_steps=1",
        "--set", f"train.dtype={run.dtype}", "--set", "train.schedule=constant",
        "--set", "train.warmup_ratio=0",
    ]  # fmt: skip
    start = [sys.executable, "-m"]
    if run.preset is not None:
        preset = ROOT / "recipes" / "accelerate" / f"{run.preset}.yaml"
        start += [
            "accelerate.commands.launch", "--config_file", str(preset),
            "--num_processes", str(run.processes), "--main_process_port", "0", "--module",
        ]  # fmt: skip
    module = "realign" if run.processes == 1 else "benchmarks.gpu.rank_process"
    return [*start, module, *map(str, train)]


def _measure(
    run: Run,
    device: torch.device,
    train: Callable[[Run], Cell | None],
    folder: Callable[[], Path],
) -> Cell:
    if reason := why_not(run, device):
        return {"status": "unavailable", "reason": reason}
    # an earlier call may have measured the other one
    other = next(one for one in RUNS if one.name == run.compared_with)
    for one in dict.fromkeys((other, run)):
        if (cell := train(one)) is not None:
            return cell
    return compared(folder(), run)


def _train(folder: Path, run: Run, session: Session) -> Cell | None:
    """Train; return a cell if that has failed, else None."""
    hidden = {} if session.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    most = _SECONDS[session.device.type]
    seconds = min(most, session.seconds_left)
    ended = run_command(command(folder, run), seconds, {"HF_HUB_OFFLINE": "1", **hidden})
    if ended.code is None and seconds < most:
        return {"status": "not measured", "reason": "out of time"}
    if ended.code is None:
        return {"status": "failed", "reason": f"{run.name} had not ended after {seconds:.0f} s"}
    if ended.code:
        return {"status": "failed", "reason": f"{run.name}: {error_of(ended.output)}"[:300]}
    return None


def compared(folder: Path, run: Run) -> Cell:
    """Return a cell with the distance of a result from the one that it is compared with."""
    before, weights, other = (
        weights_of(place)
        for place in (
            folder / "model",
            folder / run.name / "checkpoint",
            folder / run.compared_with / "checkpoint",
        )
    )
    cell: Cell = {
        "status": "ok",
        "processes": run.processes,
        "tensors": len(weights),
        "moved": distance(weights, before) / norm(before),
        "compared_with": run.compared_with,
        "distance": distance(weights, other) / distance(other, before),
    }
    if not cell["distance"] <= run.bound:
        reason = f"{cell['distance']:.1e} of what was trained from {run.compared_with}"
        cell |= {"status": "failed", "reason": reason}
    return cell


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights in a model's folder, in float64."""
    return {
        name: weight.double()
        for path in sorted(folder.glob("*.safetensors"))
        for name, weight in load_file(path).items()
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the Frobenius norm of the difference of two models' weights."""
    if one.keys() != other.keys():
        raise ValueError(f"weights differ by name: {sorted(one.keys() ^ other.keys())[:3]}")
    return norm({name: one[name] - other[name] for name in one})


def norm(weights: dict[str, torch.Tensor]) -> float:
    """Return the Frobenius norm of all weights together."""
    return float(sum(weight.square().sum() for weight in weights.values())) ** 0.5


def error_of(text: str) -> str:
    """Return the line of an output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "realign: " in line]
    # the launcher's own comes last
    own = [line for line in errors if "CalledProcessError" not in line and "Child" not in line]
    return ([*own, *errors, *lines[-1:]] or ["it said nothing"])[0][:300]
