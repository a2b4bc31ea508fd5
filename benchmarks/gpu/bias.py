"""Error and bias of log-probabilities at large hidden sizes: do tensor cores keep the promise?

They truncate their sums, always towards zero, so the errors are a bias that adds up over an answer.
``benchmarks.head.truncation`` emulates this; here it is measured, with a BLAS and with
``accumulate="exact"``, against float64 from the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.session import Measure
from benchmarks.head.truncation import CASES, Case
from benchmarks.promises import DTYPES, LOGP_BOUND, in_float64
from realign_kernels import linear_logprob
from realign_kernels.testing import HeadInputs, dense_logits, dense_logprob

HIDDEN_SIZES = (4096, 8192)
NUM_ROWS, VOCABULARY = 512, 32064
KINDS = (*CASES, Case("std 10, offset -30", 10.0, -30.0))


def bias_cells(device: torch.device, backend: str, *, tiny: bool) -> Iterator[tuple[str, Measure]]:
    """Yield a measurement for every hidden size, kind of logits and way to accumulate."""
    dtype = "bfloat16"
    for hidden_size in (64,) if tiny else HIDDEN_SIZES:
        for case in KINDS:
            for accumulate in ("auto", "exact"):
                key = f"{dtype}/D{hidden_size}/{case.name}/{accumulate}"
                sizes = (48, 301, hidden_size) if tiny else (NUM_ROWS, VOCABULARY, hidden_size)
                yield (
                    key,
                    lambda sizes=sizes, case=case, accumulate=accumulate: measure_bias(
                        draw_case(device, sizes, case, DTYPES[dtype]), dtype, backend, accumulate
                    ),
                )


def draw_case(
    device: torch.device, sizes: tuple[int, int, int], case: Case, dtype: torch.dtype
) -> HeadInputs:
    """Draw a head whose logits have a case's standard deviation and offset."""
    N, V, D = sizes
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device).mul_(case.std / D**0.5)
    if case.offset:  # as in the emulation
        hidden[:, :8], weight[:, :8] = 6.0, case.offset / (8 * 6.0)
    labels = torch.randint(V, (N,), generator=generator, device=device)
    return HeadInputs(hidden.to(dtype), weight.to(dtype), labels, {})


def measure_bias(inputs: HeadInputs, dtype: str, backend: str, accumulate: str) -> dict[str, Any]:
    """Return the largest and the mean error, and whether all are within the promise."""
    with torch.no_grad():
        actual = inputs.call(linear_logprob, backend=backend, accumulate=accumulate).double()
        exact = in_float64(inputs)
        expected = dense_logprob(exact)
        label_logits = dense_logits(exact).gather(-1, inputs.labels[:, None]).squeeze(-1)
    error = actual - expected
    allowed = LOGP_BOUND[dtype] + 1e-6 * torch.maximum(expected.abs(), label_logits.abs())
    beyond = int((~(error.abs() <= allowed)).sum())
    cell: dict[str, Any] = {
        "status": "ok",
        "largest_error": error.abs().max().item(),
        "mean_error": error.mean().item(),
        "sum_over_120": 120 * error.mean().item(),  # nats, of an answer of 120 tokens
        "rows_beyond_the_promise": beyond,
    }
    if accumulate == "exact" and beyond:  # "auto" is measured, not promised, at these sizes
        reason = f"{beyond} of {len(error)} rows are beyond the promise"
        cell |= {"status": "failed", "reason": reason}
    return cell
