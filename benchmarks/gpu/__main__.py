"""Correctness, then speed, on a GPU: ``python -m benchmarks.gpu``.

Checks every feature against float64 first and stops if one fails.  Then measurements that the
design rests on, then every provider at every shape until the time is used up; what is left is
reported as not measured.  ``--only hardware``, which takes minutes by itself, tries sizes beyond
2^31, repeats, launch configurations and CUDA graphs.  Cells merge into
``benchmarks/results/gpu_<device>.json``, so that several short calls add up: what the same code
measured on the same machine is not measured again.

Exit codes: 0; 1 if a check fails; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import run_checks
from benchmarks.gpu.hardware import run_hardware_checks
from benchmarks.gpu.questions import (
    epilogue_cells,
    launch_cells,
    overlap_cells,
    product_cells,
    tile_cells,
)
from benchmarks.head.providers import MODES, PROVIDERS, Inputs, why_not
from benchmarks.measure import Exact, exact, measure_cell
from benchmarks.promises import DTYPES, Outcome
from benchmarks.result_files import RESULTS, environment, is_current, load, merge, slug
from benchmarks.shapes import HeadShape, make_inputs, shapes_for

Cells = dict[str, dict[str, Any]]
CHECKS = {"checks": run_checks, "hardware": run_hardware_checks}
_QUICK_MODELS = ("llava-1.5-7b", "qwen2.5-vl-3b")
_QUICK_TOKENS = (1024, 4096)


class Session:
    """Measurements of one call of this script, and the time that it may take."""

    def __init__(self, device: torch.device, path: Path, run: dict[str, Any], minutes: float):
        self.device, self.path, self.run = device, path, run
        self.deadline = time.monotonic() + 60 * minutes
        self.cells: Cells = {}

    @property
    def is_over(self) -> bool:
        """Return whether the time is used up."""
        return time.monotonic() > self.deadline

    def is_done(self, key: str) -> bool:
        """Return whether an earlier call has finished a cell."""
        return is_current(load(self.path), key, self.run)

    def add(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell, if there is time, and write it down at once."""
        if self.is_done(key):
            return
        if self.is_over:
            cell = {"status": "not measured", "reason": "out of time"}
        else:
            try:
                cell = measure()
            except Exception as error:  # one provider's failure at one shape is a cell's content
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                cell = {"status": "failed", "reason": reason}
                traceback.print_exc(limit=-3)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.cells[key] = cell
        merge(self.path, self.run, {key: cell})
        print(f"{key:60} {describe(cell)}", flush=True)


def describe(cell: dict[str, Any]) -> str:
    """Say in a line what a cell holds."""
    if cell["status"] != "ok":
        return f"{cell['status']}: {cell['reason']}"
    if "ratio_to_gemm" in cell:
        worst = " ".join(f"{name} {value:.1e}" for name, value in cell["errors"].items())
        return (
            f"{cell['ms']:9.3f} ms  {cell['ratio_to_gemm']:6.2f} x GEMM  "
            f"{cell['peak_bytes'] / 2**20:9.1f} MiB  {worst}"
        )
    kept = [f"{name} {cell[name]:.3f}" for name in ("rate_kept", "bandwidth_kept") if name in cell]
    parts = [f"{name} {cell[name]['ms']:.3f} ms" for name in cell if isinstance(cell[name], dict)]
    alone = [f"{cell['ms']:.3f} ms"] if "ms" in cell else []
    return ", ".join([*alone, *parts, *kept])


def check(outcomes: Iterator[Outcome]) -> dict[str, Any]:
    """Run checks; print what fails, return it as a cell."""
    failures, count = [], 0
    for outcome in outcomes:
        count += 1
        if outcome.problem:
            failures.append(outcome.name)
            print(f"FAILED {outcome.name}\n  {outcome.problem}", flush=True)
    print(f"correctness: {count - len(failures)} of {count} checks passed", flush=True)
    status = "failed" if failures else "ok"
    return {"status": status, "reason": ", ".join(failures), "checks": count}


def head_table(session: Session, shapes: list[HeadShape], names: Sequence[str], dtype: str) -> None:
    """Measure providers, a shape and a job at a time."""
    reasons = {n: why_not(PROVIDERS[n], session.device, DTYPES[dtype]) for n in names}
    for shape in shapes:
        for job in ("token", "mean", "dpo"):
            wanted = [name for name in names if PROVIDERS[name].job == job]
            _job_table(session, shape, job, wanted, reasons, dtype)


def _job_table(
    session: Session,
    shape: HeadShape,
    job: str,
    names: list[str],
    reasons: dict[str, str | None],
    dtype: str,
) -> None:
    prepared: list[tuple[Inputs, Exact]] = []

    def prepare() -> tuple[Inputs, Exact]:
        # drawn only if some cell is still to be measured: the float64 truth takes seconds
        if not prepared:
            inputs = make_inputs(shape, job, DTYPES[dtype], session.device)
            prepared.append((inputs, exact(inputs, job)))
        return prepared[0]

    def measure(name: str, mode: str) -> dict[str, Any]:
        if reasons[name] is not None:
            return {"status": "unavailable", "reason": reasons[name]}
        inputs, truth = prepare()
        cell = measure_cell(PROVIDERS[name], mode, shape, inputs, truth)
        return {"status": "ok", "dtype": dtype, **shape._asdict(), **cell}

    for name in names:
        for mode in MODES if job == "token" else MODES[1:]:
            key = f"head/{job}/{dtype}/{shape.key}/{mode}/{name}"
            session.add(key, lambda name=name, mode=mode: measure(name, mode))


def questions(session: Session, backend: str, *, tiny: bool) -> None:
    """Measure what the design rests on."""
    for key, measure in _question_cells(session.device, backend, tiny=tiny):
        session.add(f"question/{key}", measure)


def _question_cells(
    device: torch.device, backend: str, *, tiny: bool
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield from product_cells(device, tiny=tiny)
    yield from epilogue_cells(device, backend, tiny=tiny)
    yield from tile_cells(device, backend, tiny=tiny)
    yield from launch_cells(device, backend)
    yield from overlap_cells(device, backend)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu runs the same code at tiny shapes, to test this script",
    )  # fmt: skip
    parser.add_argument("--backend", help="of the checks; default triton, or cpu for --device cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the table; default bfloat16")
    parser.add_argument(
        "--quick", action="store_true", help="two heads, 1024 and 4096 tokens; few and small checks"
    )
    parser.add_argument("--shapes", nargs="+", help="models, or model/N1024")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--keep-going", action="store_true", help="time even what is wrong")
    parser.add_argument("--only", choices=(*CHECKS, "questions", "head"), help="one part")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="for a checkout without git")
    return parser


def _wanted(shapes: list[HeadShape], names: list[str] | None, *, quick: bool) -> list[HeadShape]:
    if names:
        wanted = [shape for shape in shapes if {shape.model, shape.key} & set(names)]
        known = {shape.model for shape in shapes} | {shape.key for shape in shapes}
        if unknown := set(names) - known:
            raise ValueError(f"--shapes must be among {sorted(known)}, got {sorted(unknown)}.")
        return wanted
    if quick:
        return [s for s in shapes if s.model in _QUICK_MODELS and s.N in _QUICK_TOKENS]
    return shapes


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, write."""
    options = _parser().parse_args(arguments)
    tiny = options.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 2
    try:
        shapes = _wanted(
            shapes_for(options.device, tiny=tiny), options.shapes, quick=options.quick and not tiny
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    device = torch.device(options.device)
    backend = options.backend or ("cpu" if tiny else "triton")
    dtype = options.dtype or ("float32" if tiny else "bfloat16")
    run = environment(device, options.commit) | {"command": "python -m benchmarks.gpu"}
    path = options.out / f"gpu_{'cpu' if tiny else slug(run['device'])}.json"
    session = Session(device, path, run, options.minutes)
    print(f"{run['device']}, commit {run['commit']}, torch {run['versions']['torch']}", flush=True)

    has_failed = False
    part = options.only or "checks"
    if part in CHECKS:
        cell = check(CHECKS[part](device, backend, tiny=tiny or options.quick))
        # small checks are not to pass for the others
        of = f"{backend}/quick" if options.quick and not tiny else backend
        merge(path, run, {f"{part}/{of}": cell})
        has_failed = cell["status"] == "failed"
        if has_failed and not options.keep_going:
            print("stopped: a check failed; nothing was timed.", file=sys.stderr)
            return 1
    if options.only in (None, "questions"):
        questions(session, backend, tiny=tiny)
    if options.only in (None, "head"):
        head_table(session, shapes, options.providers, dtype)
    statuses = [cell["status"] for cell in session.cells.values()]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    print(f"{counts or 'nothing left to measure'}; wrote {path.name}")
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
