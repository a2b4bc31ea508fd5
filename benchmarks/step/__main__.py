"""Training steps of ours, of the authors' scheme and of TRL: ``python -m benchmarks.step``.

All schemes train the same model, from the same seed, on the same pairs. Each has a process of its
own, and the processes take turns. A step is the forward, backward, clipping and optimizer step of
one micro-batch, in ``transformers.Trainer``'s loop; collation and the building of our cache are
timed separately. The losses of all steps are compared, since times of different trainings would
mean nothing.

It writes ``benchmarks/results/cpu_step.json``, or on a GPU ``step_<device>.json``, for the 7B
shapes with random weights (not run on one yet; docs/proofs.md has the commands). A scheme that is
not installed, does not fit or fails is a row with its reason; one without time, "not measured".
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_files import RESULTS, environment, merge, slug
from benchmarks.step.setup import Job
from benchmarks.step.shapes import MODES, SCHEMES, SHAPES, predicted_ratio, work
from benchmarks.step.table import HEADER, line
from benchmarks.step.turns import Cells, run_jobs, steps_of_a_turn

CHECKPOINTING = {  # activation checkpointing by scheme
    "off": {},
    "on": dict.fromkeys(SCHEMES, True),
    "defaults": {"trl": True},
}
# variants of ours, which has stock layers and SDPA: name, and what is changed in the job
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "liger": ("ours, Liger layers", {"liger": True}),
    "flash": ("ours, flash-attention", {"attention": "flash_attention_2"}),
    "compiled": ("ours, compiled layers", {"compiled": True}),
}
# contender -> module and package that it needs
PACKAGES = {
    "ours, Liger layers": ("liger_kernel", "liger-kernel"),
    "ours, flash-attention": ("flash_attn", "flash-attn"),
    "trl": ("trl", "trl"),
    "trl, plain head": ("trl", "trl"),
}
LARGEST_DIFFERENCE = 1e-4  # of two float32 losses


def compare(cells: Cells, jobs: dict[str, Job]) -> None:
    """Add to each cell its ratios to ours, repeat by repeat."""
    ours = cells["ours"]
    for name, cell in cells.items():
        if cell["status"] != "ok":
            continue
        job = jobs[name]
        shape = job.step_shape
        cell["step_seconds"] = spread(cell["seconds"])
        cell["pairs_per_second"] = job.pairs / cell["step_seconds"]["median"]
        cell["beyond_weights_bytes"] = cell["peak_bytes"] - cell["weights_bytes"]
        cell |= work(job.scheme, shape)._asdict()
        cell |= {"pairs": job.pairs, "checkpoints": job.checkpoints, "dtype": job.dtype}
        if ours["status"] != "ok":
            continue
        pairs = zip(cell["seconds"], ours["seconds"], strict=False)
        cell["ratio"] = spread([theirs / own for theirs, own in pairs])
        cell["peak_ratio"] = cell["peak_bytes"] / ours["peak_bytes"]
        cell["beyond_weights_ratio"] = cell["beyond_weights_bytes"] / ours["beyond_weights_bytes"]
        cell["predicted_ratio"] = predicted_ratio(
            job.scheme, shape, job.mode,
            ours_checkpoints=jobs["ours"].checkpoints, checkpoints=job.checkpoints,
        )  # fmt: skip
        cell["prediction_reached"] = cell["ratio"]["median"] / cell["predicted_ratio"]
        losses = zip(cell["losses"], ours["losses"], strict=False)  # of turns that both had
        cell["loss_difference"] = max(abs(theirs - own) for theirs, own in losses)


def aims_line(name: str, cell: dict[str, Any]) -> str:
    """Return a line on the share of the predicted ratio that was reached, and on memory."""
    return (
        f"{name}: {cell['ratio']['median']:.2f}x ours, {100 * cell['prediction_reached']:.0f} % of "
        f"what token counts predict; ours has {1 / cell['beyond_weights_ratio']:.2f} of its peak "
        "memory beyond weights"
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def missing_package(contender: str) -> str | None:
    """Return why a contender cannot start, or None."""
    module, package = PACKAGES.get(contender, ("torch", "torch"))
    return None if importlib.util.find_spec(module) else f"{package} is not installed"


def contenders(options: argparse.Namespace, shape: str, mode: str, out: str) -> dict[str, Job]:
    """Return the jobs of one mode by name, ours first."""
    turns = options.repeats + bool(options.profile)
    common = Job(
        "ours", shape, mode, options.pairs,
        steps=options.warm_steps + turns * steps_of_a_turn(options.device),
        dtype=options.dtype, device=options.device, threads=options.threads, out=out,
    )  # fmt: skip
    recomputes = CHECKPOINTING[options.checkpointing]
    jobs = {
        scheme: replace(common, scheme=scheme, checkpoints=recomputes.get(scheme, False))
        for scheme in SCHEMES
        if scheme in options.schemes
    }
    if "trl" in jobs and options.device == "cpu":
        jobs["trl, plain head"] = replace(jobs["trl"], plain_head=True)
    for name, changes in (VARIANTS[variant] for variant in options.variants):
        jobs[name] = replace(jobs["ours"], **changes)
    if options.profile:
        jobs = {
            name: replace(job, profile=str(profile_file(options.profile, shape, mode, name)))
            for name, job in jobs.items()
        }
    return jobs


def profile_file(folder: Path, shape: str, mode: str, contender: str) -> Path:
    """Return the file for a contender's profile, whose name has neither spaces nor commas."""
    name = f"{shape} {mode} {contender}.txt".replace(",", "").replace(" ", "-")
    return (folder / name).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llava-64m"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[], help="of ours")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="off")
    parser.add_argument("--pairs", type=int, default=1, help="of a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-steps", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="limit of all shapes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--profile", type=Path, help="folder for tables of the operators of one more step each"
    )
    parser.add_argument("--commit", help="for a checkout without git")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results.

    Returns:
        0; 1 if float32 losses differ by more than 1e-4, or a contender failed or had no turn; 2 if
        the options are wrong or there is no such device.
    """
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if "ours" not in options.schemes:
        print("--schemes must contain ours, which all are compared with.", file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    run = environment(device, options.commit) | {"command": "python -m benchmarks.step"}
    file = "cpu_step" if options.device == "cpu" else f"step_{slug(run['device'])}"
    print(HEADER)
    is_good = True
    deadline = time.monotonic() + 60 * options.minutes
    for shape, mode in [(shape, mode) for shape in options.shape for mode in options.modes]:
        with tempfile.TemporaryDirectory() as out:
            jobs = contenders(options, shape, mode, out)
            absent = {name: reason for name in jobs if (reason := missing_package(name))}
            able = {name: job for name, job in jobs.items() if name not in absent}
            seconds = deadline - time.monotonic()
            cells = run_jobs(able, options.repeats, options.warm_steps, seconds=seconds)
        cells |= {name: {"status": "unavailable", "reason": absent[name]} for name in absent}
        compare(cells, jobs)
        print(f"{shape}, {mode}")
        for contender, cell in cells.items():
            cell["load_before"] = load_before
            print(line(contender, cell), flush=True)
            differs = cell.get("loss_difference", 0) > LARGEST_DIFFERENCE
            is_wrong = options.dtype == "float32" and differs
            if cell["status"] not in ("ok", "unavailable") or is_wrong:
                is_good = False
        for contender, cell in cells.items():
            if contender != "ours" and "prediction_reached" in cell:
                print(aims_line(contender, cell))
        settings = f"{options.dtype}/{options.pairs}/{options.checkpointing}"
        keyed = {f"step/{shape}/{mode}/{settings}/{name}": c for name, c in cells.items()}
        merge(options.out / f"{file}.json", run, keyed)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
