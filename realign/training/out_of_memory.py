"""Error of a full device, with the largest micro-batch that keeps the pairs per step."""

from __future__ import annotations

import re

from realign.errors import RefusedError
from realign.modeling.memory import Footprint, size

_REQUESTED = re.compile(r"ried to allocate ([\d.]+) ?(bytes|[KMG]iB)?")
_UNITS = {None: 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def out_of_memory(
    error: BaseException,
    footprint: Footprint,
    *,
    batch_size: int,
    accumulation: int,
    allocated: int | None = None,
    capacity: int | None = None,
) -> RefusedError:
    """Return an error that explains an out-of-memory error and names a remedy.

    Args:
        error: The exception that was caught.
        footprint: Memory of the model before any activation.
        batch_size: Pairs per micro-batch.
        accumulation: Micro-batches per step.
        allocated: Peak of the allocated bytes so far, if the device counts them.
        capacity: Bytes of the device's memory.
    """
    requested = _requested(str(error))
    lines = [
        "the device's memory is full"
        + (f": {size(requested)} more did not fit" if requested else "")
        + (f" into {size(capacity)}" if capacity else "")
        + ".",
        f"peak = {footprint}, + activations of the {batch_size} pair(s) of a micro-batch"
        + (f"; at most {size(allocated)} were allocated." if allocated else "."),
    ]
    largest = _largest(footprint.total, batch_size, requested, allocated, capacity)
    pairs = batch_size * accumulation
    # the number of pairs per step must not change, so only its divisors
    safe = max((n for n in range(1, largest + 1) if pairs % n == 0), default=0)
    if safe:
        lines.append(
            f"The largest micro-batch that may fit is {safe}: set batch_size to {safe}, which "
            f"accumulates {pairs // safe} micro-batches, so that a step keeps its {pairs} pairs "
            "per process. No option was changed automatically."
        )
    else:
        lines.append(
            f"No smaller micro-batch is sure to fit (batch_size is {batch_size}): switch on "
            "gradient_checkpointing, train a LoRA adapter, or remove the longest rows."
        )
    return RefusedError("\n".join(lines), code="out-of-memory")


def _requested(text: str) -> int:
    found = _REQUESTED.search(text)
    return int(float(found[1].rstrip(".")) * _UNITS[found[2]]) if found else 0


def _largest(
    model_bytes: int, batch_size: int, requested: int, allocated: int | None, capacity: int | None
) -> int:
    """Return the number of pairs that may fit, if ``batch_size`` pairs take what was requested."""
    fewer = batch_size - 1
    if allocated is None or capacity is None:
        return fewer
    bytes_per_pair = max(1.0, (allocated + requested - model_bytes) / batch_size)
    return min(fewer, max(0, int((capacity - model_bytes) / bytes_per_pair)))
