"""Error of a full device, with the largest micro-batch that keeps the pairs of a step."""

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
    """Return the error to raise instead.

    Args:
        error: The exception that was caught.
        footprint: Memory of the model before any activation.
        batch_size: Pairs per micro-step.
        accumulation: Micro-batches per step.
        allocated: Most bytes allocated so far, if the device counts them.
        capacity: Bytes of the device's memory.
    """
    requested = _requested(str(error))
    lines = [
        "the device's memory is full"
        + (f": {size(requested)} more did not fit" if requested else "")
        + (f" into {size(capacity)}" if capacity else "")
        + ".",
        f"peak = {footprint}, + activations of {batch_size} pair(s) of a micro-step"
        + (f"; at most {size(allocated)} were held." if allocated else "."),
    ]
    largest = _largest(footprint.total, batch_size, requested, allocated, capacity)
    pairs = batch_size * accumulation
    # the pairs of a step stay what they are, so only what divides them
    safe = max((n for n in range(1, largest + 1) if pairs % n == 0), default=0)
    if safe:
        lines.append(
            f"The largest micro-batch that may fit is {safe}: set batch_size to {safe}, which "
            f"accumulates {pairs // safe} micro-batches, so that a step keeps its {pairs} pairs "
            "per process. Nothing was changed by itself."
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
    before: int, batch_size: int, requested: int, allocated: int | None, capacity: int | None
) -> int:
    """Return how many pairs may fit: the step needed at least ``allocated + requested`` in all."""
    fewer = batch_size - 1
    if allocated is None or capacity is None:
        return fewer
    a_pair = max(1.0, (allocated + requested - before) / batch_size)
    return min(fewer, max(0, int((capacity - before) / a_pair)))
