"""One training step of ours, of the authors' scheme and of TRL: ``python -m benchmarks.step``.

The same model, from the same seed, and the same pairs, each scheme in a process of its own, which
take turns. A step is forward, backward, clipping and optimizer step of one micro-batch, in
``transformers.Trainer``'s loop; collation and the building of our cache are timed apart. The losses
of all steps are compared: all three train the same thing, or the comparison says nothing.

Writes ``benchmarks/results/cpu_step.json``, or ``step_<device>.json`` for the 7B shapes, with
random weights, on a GPU (written for one, not run on one yet):

    python -m benchmarks.step --device cuda --dtype bfloat16 --modes lora --shape llava-1.5-7b \\
        --checkpointing on --variants liger flash
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_files import RESULTS, environment, merge, slug
from benchmarks.step.setup import Job
from benchmarks.step.shapes import MODES, SCHEMES, SHAPES, predicted_ratio, work
from benchmarks.step.table import HEADER, line

CHECKPOINTING = {  # activation checkpointing by scheme
    "off": {},
    "on": dict.fromkeys(SCHEMES, True),
    "defaults": {"trl": True},
}
VARIANTS = ("liger", "flash")  # of ours, beside stock layers and SDPA
PACKAGES = {"liger": "liger_kernel", "flash": "flash_attn", "trl": "trl"}
LARGEST_DIFFERENCE = 1e-4  # of two float32 losses

Cells = dict[str, dict[str, Any]]


class Worker:
    """A process that trains when it is told to."""

    def __init__(self, job: Job) -> None:
        # closed with the process
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=RESULTS.parents[1],
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()

    def read(self) -> dict[str, Any]:
        """Return the next line.

        Raises:
            RuntimeError: The process ended; with the last line that it wrote.
        """
        assert self._process.stdout is not None
        if text := self._process.stdout.readline():
            return json.loads(text)
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()] or ["it said nothing"]
        raise RuntimeError(lines[-1][:300])

    def turn(self, steps: int) -> dict[str, Any]:
        """Let it train some steps and return what it says of them."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # read() says why it ended
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self.read()


def run_jobs(jobs: dict[str, Job], repeats: int, warm_steps: int) -> Cells:
    """Measure schemes in turn, one step a turn.

    On a GPU a turn has one more, not timed: idle processes have given their memory back.

    Args:
        jobs: By contender.
        repeats: Turns of each.
        warm_steps: Steps before the first turn.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(job)) for name, job in jobs.items()}
        cells: Cells = {}
        for name, worker in list(workers.items()):
            try:
                lists: dict[str, Any] = {"seconds": [], "cpu_seconds": [], "losses": []}
                cells[name] = {"status": "ok", **worker.read(), **lists}
                _take_turn(worker, cells[name], warm_steps, counts=False)
            except RuntimeError as error:
                cells[name] = {"status": "failed", "reason": str(error)}
                del workers[name]
        for repeat in range(repeats):
            order = list(workers)
            for name in order if repeat % 2 else reversed(order):
                steps = steps_of_a_turn(jobs[name].device)
                try:
                    _take_turn(workers[name], cells[name], steps, counts=True)
                except RuntimeError as error:
                    cells[name] = {"status": "failed", "reason": str(error)}
                    del workers[name]
        for name, worker in workers.items():
            if not jobs[name].profile:
                continue
            try:
                worker.turn(steps_of_a_turn(jobs[name].device))  # the last one is recorded
            except RuntimeError as error:  # what was measured stays
                print(f"no profile of {name}: {error}", file=sys.stderr)
    return cells


def steps_of_a_turn(device: str) -> int:
    """Return the steps of a turn, of which the last counts: on a GPU the first claims memory."""
    return 2 if device == "cuda" else 1


def _take_turn(worker: Worker, cell: dict[str, Any], steps: int, *, counts: bool) -> None:
    if not steps:
        return
    found = worker.turn(steps)
    cell["losses"] += found["losses"]
    cell["peak_bytes"] = max(cell.get("peak_bytes", 0), found["peak_bytes"])
    if counts:
        for name in ("seconds", "cpu_seconds"):
            cell[name].append(found[name][-1])


def compare(cells: Cells, jobs: dict[str, Job]) -> None:
    """Put into each cell what it is beside ours, repeat by repeat."""
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
        pairs = zip(cell["seconds"], ours["seconds"], strict=True)
        cell["ratio"] = spread([theirs / own for theirs, own in pairs])
        cell["peak_ratio"] = cell["peak_bytes"] / ours["peak_bytes"]
        cell["beyond_weights_ratio"] = cell["beyond_weights_bytes"] / ours["beyond_weights_bytes"]
        cell["predicted_ratio"] = predicted_ratio(
            job.scheme, shape, job.mode,
            ours_checkpoints=jobs["ours"].checkpoints, checkpoints=job.checkpoints,
        )  # fmt: skip
        losses = zip(cell["losses"], ours["losses"], strict=True)
        cell["loss_difference"] = max(abs(theirs - own) for theirs, own in losses)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def contenders(options: argparse.Namespace, mode: str, out: str) -> dict[str, Job]:
    """Return the jobs of one mode by name, ours first."""
    turns = options.repeats + bool(options.profile)
    common = Job(
        "ours", options.shape, mode, options.pairs,
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
    if "liger" in options.variants:
        jobs["ours, Liger layers"] = replace(jobs["ours"], liger=True)
    if "flash" in options.variants:
        jobs["ours, flash-attention"] = replace(jobs["ours"], attention="flash_attention_2")
    if options.profile:
        files = {name: f"{options.shape} {mode} {name}.txt".replace(" ", "-") for name in jobs}
        jobs = {
            name: replace(job, profile=str((options.profile / files[name]).absolute()))
            for name, job in jobs.items()
        }
    return jobs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llava-64m")
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
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--profile", type=Path, help="folder for tables of the operators of one more step each"
    )
    parser.add_argument("--commit", help="for a checkout without git")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        0; 1 where float32 losses differ by more than 1e-4 or nothing could be measured; 2 without
        the device or a package.
    """
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if "ours" not in options.schemes:
        print("--schemes must contain ours, which all are compared with.", file=sys.stderr)
        return 2
    for name in [*options.variants, *({"trl"} & set(options.schemes))]:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            print(f"{PACKAGES[name]} is not installed: leave out {name}.", file=sys.stderr)
            return 2
    load_before = os.getloadavg()[0]
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    run = environment(device, options.commit) | {"command": "python -m benchmarks.step"}
    file = "cpu_step" if options.device == "cpu" else f"step_{slug(run['device'])}"
    print(HEADER)
    is_good = True
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as out:
            jobs = contenders(options, mode, out)
            cells = run_jobs(jobs, options.repeats, options.warm_steps)
        compare(cells, jobs)
        for contender, cell in cells.items():
            cell["load_before"] = load_before
            print(line(contender, cell), flush=True)
            differs = cell.get("loss_difference", 0) > LARGEST_DIFFERENCE
            if cell["status"] != "ok" or (options.dtype == "float32" and differs):
                is_good = False
        settings = f"{options.dtype}/{options.pairs}/{options.checkpointing}"
        keyed = {f"step/{options.shape}/{mode}/{settings}/{name}": c for name, c in cells.items()}
        merge(options.out / f"{file}.json", run, keyed)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
