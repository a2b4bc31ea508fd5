"""Errors of every head against float64 on the same inputs: ``python -m benchmarks.head.accuracy``.

It writes ``benchmarks/results/accuracy_<device>.json``.  The numbers do not depend on how busy the
machine is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.head.providers import Inputs, Provider, providers_of, why_not
from benchmarks.head.row_classes import ROW_CLASSES, make_rows
from benchmarks.measure import Exact, exact, quantile
from benchmarks.result_files import RESULTS, environment, merge

NUM_ROWS = 512  # a long answer, whose sum enters a preference loss
HIDDEN_SIZE, VOCABULARY = 1024, 32064
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def row_errors(provider: Provider, inputs: Inputs, truth: Exact) -> dict[str, Any]:
    """Return the errors of values, their sum, and the gradient of each hidden state."""
    result = provider.run("frozen", inputs).double()
    grad = inputs.hidden_states.grad
    assert grad is not None
    grad_errors = (grad.double() - truth.grad_hidden).norm(dim=-1) / truth.grad_hidden.norm(dim=-1)
    inputs.hidden_states.grad = None
    difference = result - truth.result
    return {
        "status": "ok",
        "logp": _spread(difference.abs()),
        "sum_of_512": difference.sum().abs().item(),
        "grad_hidden_row": _spread(grad_errors),
        "note": provider.note,
    }


def measure(
    device: torch.device,
    dtypes: Sequence[str],
    classes: Sequence[str],
    names: Sequence[str],
    *,
    num_rows: int = NUM_ROWS,
    hidden_size: int = HIDDEN_SIZE,
    vocabulary: int = VOCABULARY,
) -> dict[str, dict[str, Any]]:
    """Return the cells, with keys ``dtype/class/provider``, and print each."""
    providers = {name: p for name, p in providers_of("token").items() if name in names}
    cells = {}
    for dtype in dtypes:
        reasons = {name: why_not(p, device, DTYPES[dtype]) for name, p in providers.items()}
        for kind in classes:
            rows = make_rows(kind, num_rows, hidden_size, vocabulary, DTYPES[dtype])
            inputs = Inputs(*(t.to(device) for t in rows[:4]), rows.logit_softcap)
            truth = exact(inputs, "token")
            for name, provider in providers.items():
                reason = reasons[name]
                if reason is None and inputs.logit_softcap is not None:
                    reason = None if provider.has_softcap else "has no softcap"
                if reason is None:
                    cell = row_errors(provider, inputs, truth)
                else:
                    cell = {"status": "unavailable", "reason": reason}
                cells[f"{dtype}/{kind}/{name}"] = cell
                print(f"{dtype:9} {kind:11} {name:18} {_line(cell)}", flush=True)
    return cells


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "p50": quantile(values, 0.5),
        "p99": quantile(values, 0.99),
        "max": quantile(values, 1.0),
    }


def _line(cell: dict[str, Any]) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']}: {cell['reason']}"
    logp, grad = cell["logp"], cell["grad_hidden_row"]
    return (
        f"logp p50 {logp['p50']:.1e} p99 {logp['p99']:.1e} max {logp['max']:.1e}  "
        f"sum {cell['sum_of_512']:.1e}  grad row p50 {grad['p50']:.1e} max {grad['max']:.1e}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--classes", nargs="+", choices=ROW_CLASSES, default=list(ROW_CLASSES))
    names = list(providers_of("token"))
    parser.add_argument("--providers", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="for a checkout without git")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    run = environment(device, options.commit) | {"command": "python -m benchmarks.head.accuracy"}
    run |= {"num_rows": NUM_ROWS, "hidden_size": HIDDEN_SIZE, "vocabulary": VOCABULARY}
    cells = measure(device, options.dtypes, options.classes, options.providers)
    path = options.out / f"accuracy_{device.type}.json"
    merge(path, run, cells)
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
