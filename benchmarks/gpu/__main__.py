"""Correctness, then speed, on a GPU: ``python -m benchmarks.gpu --only PART``.

``--only`` takes one of the parts below, each with a limit of minutes of its own; docs/proofs.md has
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

Cells merge into ``benchmarks/results/gpu_<device>.json`` as they are measured, so that several
short calls add up: what the same code measured on the same machine is not measured again, what
fails is a cell with its reason, and what the time was not enough for is "not measured".

Exit codes: 0; 1 if a check fails; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
from benchmarks.gpu.session import Measure, Session
from benchmarks.head.providers import PROVIDERS
from benchmarks.promises import DTYPES
from benchmarks.result_files import RESULTS, environment, load, slug
from benchmarks.shapes import HeadShape, shapes_for

# parts and their minutes; the first three fit together into a quarter of an hour
MINUTES = {
    "correct": 6.0, "questions": 2.5, "sanitizer": 3.0, "head": 9.0, "layers": 4.0, "ranks": 6.0,
    "checks": 3.0, "bias": 1.0, "hardware": 5.0,
}  # fmt: skip
_OF_ALL = 9.0  # minutes without --only
_QUICK_MODELS = ("llava-1.5-7b", "qwen2.5-vl-3b")
_QUICK_TOKENS = (1024, 4096)


def check(session: Session, backend: str, *, tiny: bool, quick: bool) -> None:
    """Run the checks of every feature."""
    # small checks are not to pass for the others
    of = f"{backend}/quick" if quick and not tiny else backend
    session.check(f"checks/{of}", kernel_checks(session.device, backend, tiny=tiny or quick))


def measure_bias(session: Session, backend: str, *, tiny: bool) -> None:
    """Measure errors at large hidden sizes."""
    for key, measure in bias_cells(session.device, backend, tiny=tiny):
        session.add(f"bias/{key}", measure)


def check_hardware(session: Session, backend: str, *, tiny: bool) -> None:
    """Run the checks that need a GPU."""
    session.check(f"hardware/{backend}", hardware_checks(session.device, backend, tiny=tiny))


def questions(session: Session, backend: str, *, tiny: bool) -> None:
    """Measure what the design rests on."""
    for key, measure in _question_cells(session.device, backend, tiny=tiny):
        session.add(f"question/{key}", measure)


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


def run_part(part: str, session: Session, backend: str, options: argparse.Namespace) -> None:
    """Run one part, except the head table."""
    tiny = options.device == "cpu"
    if part == "correct":
        native = NativeTests(session, options.tests)
        check(session, backend, tiny=tiny, quick=options.quick)
        measure_bias(session, backend, tiny=tiny)
        check_hardware(session, backend, tiny=tiny or options.quick)
        native.finish()
    elif part == "checks":
        check(session, backend, tiny=tiny, quick=options.quick)
    elif part == "layers":
        from benchmarks.gpu.layers import compare_layers  # imports transformers

        compare_layers(session)
    elif part == "ranks":
        from benchmarks.gpu.ranks import compare_ranks

        compare_ranks(session)
    else:
        parts: dict[str, Callable[..., None]] = {
            "bias": measure_bias, "hardware": check_hardware, "questions": questions,
        }  # fmt: skip
        if part == "sanitizer":
            sanitize(session, backend)
        else:
            parts[part](session, backend, tiny=tiny)


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
    parser.add_argument("--only", choices=MINUTES, metavar="PART", help="one part, see above")
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
    minutes = options.minutes
    if minutes is None:
        minutes = MINUTES[options.only] if options.only else _OF_ALL
    session = Session(device, path, run, minutes)
    print(f"{run['device']}, commit {run['commit']}, torch {run['versions']['torch']}", flush=True)

    for part in [options.only] if options.only else ["checks", "questions", "head"]:
        if part == "head":
            head_table(session, shapes, options.providers, dtype)
        else:
            run_part(part, session, backend, options)
        if session.failed and part == "checks" and not options.keep_going and not options.only:
            print("stopped: a check failed; nothing was timed.", file=sys.stderr)
            break
    print(f"\n{session.table()}")
    if options.only in (None, "head"):
        print(aims_table(load(path)["cells"], dtype))
    print(f"{minutes * 60 - session.seconds_left:.0f} of {minutes * 60:.0f} s; wrote {path.name}")
    has_failed = any(session.cells[key].get("kind") == "check" for key in session.failed)
    return 1 if has_failed or (session.failed and options.only not in (None, "head")) else 0


if __name__ == "__main__":
    sys.exit(main())
