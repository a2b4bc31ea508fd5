"""Correctness, then speed, on a GPU: ``python -m benchmarks.gpu --only PART``.

``--only`` takes one of the parts below, each with its own limit in minutes; docs/proofs.md has
their order.  Without it, the checks run, then the questions, then the head table.

    correct     the kernels' own tests, `checks`, `bias` and `hardware`
    checks      every feature against float64
    bias        error and bias at large hidden sizes, where tensor cores cut sums off
    hardware    sizes beyond 2^31, repeats, launch configurations, CUDA graphs
    sanitizer   compute-sanitizer's memcheck and racecheck over small checks
    questions   what the design rests on: rates, bandwidths, tiles, paths, launches
    head        every provider at every shape
    layers      Liger's layers, flash-attention and 4-bit weights against SDPA
    ranks       FSDP2 and ZeRO, parameters against those of one process

Cells are merged into ``benchmarks/results/gpu_<device>.json`` as they are measured, so that several
short calls add up: a cell that the same code has measured on the same machine is not measured
again, a failed one has its reason, and one for which there was no time is "not measured".

Exit codes: 1 if any cell of the call failed, 0 otherwise; 2 without a GPU, or for unknown shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.bias import bias_cells
from benchmarks.gpu.checks import kernel_checks
from benchmarks.gpu.hardware import hardware_checks
from benchmarks.gpu.head import aims_table, head_table
from benchmarks.gpu.native_tests import NativeTests
from benchmarks.gpu.paths import pair_cells, path_cells
from benchmarks.gpu.questions import (
    epilogue_cells,
    launch_cells,
    overlap_cells,
    product_cells,
    tile_cells,
)
from benchmarks.gpu.sanitizer import sanitize
from benchmarks.gpu.session import Check, Measure, Session
from benchmarks.head.providers import PROVIDERS
from benchmarks.promises import DTYPES
from benchmarks.result_files import RESULTS, environment, load, slug
from benchmarks.shapes import HeadShape, shapes_for

_OF_ALL = 9.0  # minutes without --only
_QUICK_MODELS = ("llava-1.5-7b", "qwen2.5-vl-3b")
_QUICK_TOKENS = (1024, 4096)


class Call(NamedTuple):
    """A call of this script: where its cells go, and its arguments."""

    session: Session
    backend: str  # of the checks
    dtype: str  # of the head table
    shapes: list[HeadShape]  # of the head table
    options: argparse.Namespace

    @property
    def is_tiny(self) -> bool:
        """Return whether sizes are those of a CPU."""
        return bool(self.options.device == "cpu")

    def check(self, part: str, checks: Callable[..., Iterator[Check]]) -> None:
        """Run the checks of a part; quick ones have keys of their own, since sizes differ."""
        is_quick = self.options.quick and not self.is_tiny
        prefix = f"{part}/{self.backend}/quick" if is_quick else f"{part}/{self.backend}"
        is_small = self.is_tiny or is_quick
        self.session.check(prefix, checks(self.session.device, self.backend, tiny=is_small))


def _correct(call: Call) -> None:
    with NativeTests(call.session, call.options.tests):
        for part in ("checks", "bias", "hardware"):
            PARTS[part].run(call)


def _checks(call: Call) -> None:
    call.check("checks", kernel_checks)


def _bias(call: Call) -> None:
    for key, measure in bias_cells(call.session.device, call.backend, tiny=call.is_tiny):
        call.session.add(f"bias/{key}", measure)


def _hardware(call: Call) -> None:
    call.check("hardware", hardware_checks)


def _questions(call: Call) -> None:
    for key, measure in _question_cells(call.session.device, call.backend, tiny=call.is_tiny):
        call.session.add(f"question/{key}", measure)


def _question_cells(
    device: torch.device, backend: str, *, tiny: bool
) -> Iterator[tuple[str, Measure]]:
    yield from product_cells(device, tiny=tiny)
    yield from epilogue_cells(device, backend, tiny=tiny)
    yield from path_cells(device, backend, tiny=tiny)
    yield from pair_cells(device, backend, tiny=tiny)
    yield from tile_cells(device, backend, tiny=tiny)
    yield from overlap_cells(device, backend)
    yield from launch_cells(device, backend)


def _sanitizer(call: Call) -> None:
    sanitize(call.session, call.backend)


def _head(call: Call) -> None:
    head_table(call.session, call.shapes, call.options.providers, call.dtype)


def _layers(call: Call) -> None:
    from benchmarks.gpu.layers import compare_layers  # imports transformers

    compare_layers(call.session)


def _ranks(call: Call) -> None:
    from benchmarks.gpu.ranks import compare_ranks

    compare_ranks(call.session)


class Part(NamedTuple):
    """A part of this script, and its limit in minutes."""

    minutes: float
    run: Callable[[Call], None]


# the first three fit together into a quarter of an hour
PARTS = {
    "correct": Part(6.0, _correct),
    "questions": Part(2.5, _questions),
    "sanitizer": Part(3.0, _sanitizer),
    "head": Part(9.0, _head),
    "layers": Part(4.0, _layers),
    "ranks": Part(6.0, _ranks),
    "checks": Part(3.0, _checks),
    "bias": Part(1.0, _bias),
    "hardware": Part(5.0, _hardware),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--tests", default="triton", help="expression of pytest's -k, of `correct`")
    parser.add_argument("--minutes", type=float, help="limit; by default that of the part")
    parser.add_argument("--keep-going", action="store_true", help="time even what is wrong")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help="one part, see above")
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
    """Run the checks and measurements, and write the results."""
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
    minutes = options.minutes
    if minutes is None:
        minutes = PARTS[options.only].minutes if options.only else _OF_ALL
    session = Session(device, path, run, minutes)
    print(f"{run['device']}, commit {run['commit']}, torch {run['versions']['torch']}", flush=True)

    call = Call(session, backend, dtype, shapes, options)
    for part in [options.only] if options.only else ["checks", "questions", "head"]:
        PARTS[part].run(call)
        if session.failed and part == "checks" and not options.keep_going and not options.only:
            print("stopped: a check failed; nothing was timed.", file=sys.stderr)
            break
    print(f"\n{session.table()}")
    if options.only in (None, "head"):
        print(aims_table(load(path)["cells"], dtype))
    print(f"{minutes * 60 - session.seconds_left:.0f} of {minutes * 60:.0f} s; wrote {path.name}")
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
