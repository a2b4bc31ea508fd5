"""Speed, memory and error of every head on this CPU: ``python -m benchmarks.head.cpu``.

It writes ``benchmarks/results/cpu_head.json``.  A product of fixed size is timed before and after;
if it shows that the machine was busy, the file says so, and no page shows its speeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import Session, head_table
from benchmarks.head.providers import PROVIDERS
from benchmarks.measure import time_one
from benchmarks.promises import DTYPES
from benchmarks.result_files import RESULTS, environment, merge
from benchmarks.shapes import shapes_for

SHAPES = {shape.key: shape for shape in shapes_for("cpu")}
DEFAULT_SHAPES = ("llava-vocabulary-d1024/N512",)
_TOLERANCE = 1.15  # a product that takes this many times the idle time means a busy machine


def calibrate() -> float:
    """Return the median milliseconds of a float32 product of 512 x 1024 x 32064."""
    a, b = torch.randn(512, 1024), torch.randn(32064, 1024)
    out = torch.empty(512, 32064)
    times = time_one(lambda: torch.mm(a, b.T, out=out), torch.device("cpu"), seconds=10.0)
    return statistics.median(times)


def was_busy(load_before: float, products_ms: Sequence[float], idle_ms: float | None) -> bool:
    """Return whether other programs were computing too, by the load if no idle time is known."""
    if idle_ms is not None:
        return max(products_ms) > _TOLERANCE * idle_ms
    return load_before >= 0.5 or max(products_ms) > _TOLERANCE * min(products_ms)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--idle-ms", type=float, help="of the fixed product on the idle machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="for a checkout without git")
    options = parser.parse_args(arguments)

    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    run = environment(device, options.commit) | {"command": "python -m benchmarks.head.cpu"}
    session = Session(device, options.out / "cpu_head.json", run, options.minutes)
    products_ms = [calibrate()]
    for dtype in options.dtypes:
        shapes = [SHAPES[key] for key in options.shapes]
        head_table(session, shapes, options.providers, dtype)
    products_ms.append(calibrate())
    calibration = {
        "status": "ok",
        "product_ms": products_ms,
        "idle_ms": options.idle_ms,
        "load_before": load_before,
        "is_busy": was_busy(load_before, products_ms, options.idle_ms),
    }
    merge(session.path, run, {"calibration": calibration})
    if calibration["is_busy"]:
        print(
            f"The machine was busy: load {load_before:.2f}, the fixed product took "
            f"{products_ms[0]:.0f} and {products_ms[1]:.0f} ms. Measure again when it is idle.",
            file=sys.stderr,
        )
    print(f"wrote {session.path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
