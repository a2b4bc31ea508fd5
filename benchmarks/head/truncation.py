"""Truncating sums, emulated: ``python -m benchmarks.head.truncation``.

Tensor cores multiply exactly but truncate their float32 accumulator, where a CPU rounds to nearest.
(Fasi, Higham, Mikaitis, Pranesh 2021 measured it on V100, T4 and A100.)  This emulates 16 products
per step and prints the errors of a head's log-probabilities: with one accumulator over the whole
hidden size, as in a BLAS, and with partial sums of 1024 that are added in float32, as with
``accumulate="exact"``.  It is an emulation, and measures no GPU.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from realign_kernels.testing import seeded

Array = npt.NDArray[np.float64]

STEP = 16  # products that one instruction adds to its accumulator
PARTIAL = 1024
NUM_ROWS, VOCABULARY = 24, 1500


class Case(NamedTuple):
    """A kind of logits."""

    name: str
    std: float
    offset: float  # of every logit, from a few large hidden dimensions


CASES = (
    Case("std 3", 3.0, 0.0),
    Case("std 10", 10.0, 0.0),
    Case("offset -30", 3.0, -30.0),
)


class Errors(NamedTuple):
    """Errors of log-probabilities, in nats."""

    largest: float
    mean: float  # a bias adds up over an answer


def truncated(values: Array) -> npt.NDArray[np.float32]:
    """Round to float32 towards zero."""
    nearest = values.astype(np.float32)
    is_over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(is_over, np.nextafter(nearest, np.float32(0)), nearest)


def product(hidden: Array, weight: Array, *, partial: int) -> Array:
    """Return ``hidden @ weight.T`` with truncating sums over ``partial`` of the hidden size."""
    shape = hidden.shape[0], weight.shape[0]
    total = np.zeros(shape, np.float32)
    for first in range(0, hidden.shape[1], partial):
        accumulator = np.zeros(shape, np.float32)
        for start in range(first, min(first + partial, hidden.shape[1]), STEP):
            columns = slice(start, start + STEP)
            added = hidden[:, columns] @ weight[:, columns].T
            accumulator = truncated(accumulator.astype(np.float64) + added)
        total = total + accumulator
    return total.astype(np.float64)


def make_case(case: Case, hidden_size: int) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Return hidden states, weight and labels, rounded to bfloat16."""
    generator = seeded(0)
    weight = torch.randn(VOCABULARY, hidden_size, generator=generator)
    weight *= case.std / hidden_size**0.5
    hidden = torch.randn(NUM_ROWS, hidden_size, generator=generator)
    labels = torch.randint(VOCABULARY, (NUM_ROWS,), generator=generator)
    if case.offset:
        hidden[:, :8], weight[:, :8] = 6.0, case.offset / (8 * 6.0)
    rounded = (part.bfloat16().double().numpy() for part in (hidden, weight))
    return (*rounded, labels.numpy())


def log_probs(logits: Array, label_logits: Array, labels: npt.NDArray[np.int64]) -> Array:
    """Return log p of the labels, whose own logits come from elsewhere, as in the head."""
    excess = np.exp(logits - label_logits[:, None])
    excess[np.arange(len(labels)), labels] = 0.0
    return -np.log1p(excess.sum(axis=1))


def errors(case: Case, hidden_size: int, partial: int) -> Errors:
    """Return the errors against float64 on the same rounded inputs."""
    hidden, weight, labels = make_case(case, hidden_size)
    exact = hidden @ weight.T
    label_logits = exact[np.arange(len(labels)), labels]
    logits = product(hidden, weight, partial=partial)
    # the head takes the label's logit from a sum that rounds to nearest
    nearest = label_logits.astype(np.float32).astype(np.float64)
    difference = log_probs(logits, nearest, labels) - log_probs(exact, label_logits, labels)
    return Errors(float(np.abs(difference).max()), float(difference.mean()))


def main() -> None:
    """Print one line per hidden size and kind of logits."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| D | logits | BLAS: largest, mean | partial sums of 1024: largest, mean |")
    print("|---|---|---|---|")
    for hidden_size in (2048, 4096, 8192):
        for case in CASES:
            blas = errors(case, hidden_size, hidden_size)
            exact = errors(case, hidden_size, PARTIAL)
            print(
                f"| {hidden_size} | {case.name} | {blas.largest:.1e}, {blas.mean:+.1e} "
                f"| {exact.largest:.1e}, {exact.mean:+.1e} |"
            )


if __name__ == "__main__":
    main()
