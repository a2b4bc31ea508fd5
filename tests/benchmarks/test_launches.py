"""The number of launches of a call does not grow, which decides the cost of a small step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.head import launches

# Launches beside products and epilogues, value checks on.  Beside them each length that is known
# costs one copy to the device.
MOST = {
    "rdpo_loss, padded": 11,
    "rdpo_loss, padded, lengths unknown": 9,
    "rdpo_loss, packed": 12,
    "rdpo_loss, packed, lengths unknown": 10,
    "linear_logprob": 8,  # one of them on the host, where the number is a tensor
    "linear_logprob, number unknown": 6,
}
MOST_OF_TRAINED = {"rdpo_loss, stash": 32, "rdpo_loss, tile": 88}


@pytest.mark.parametrize("num_rows", [258, 1020])
@pytest.mark.parametrize("name", MOST)
def test_a_frozen_head_launches_few_kernels(name, num_rows):
    found = launches.count(launches.calls(num_rows, 32064)[name])
    assert found.small <= MOST[name], (found.operators, found.kernels)
    # The vocabulary is one tile: logits, their epilogue, and the sum of weight rows.
    assert (found.products, found.epilogues) == (2, 1)
    assert found.waits == (1 if "unknown" in name else 0)


@pytest.mark.parametrize("name", MOST_OF_TRAINED)
def test_a_trained_head_launches_few_kernels(name):
    found = launches.count(launches.calls(66, 4096)[name])
    assert found.small <= MOST_OF_TRAINED[name], (found.operators, found.kernels)
    assert (found.products, found.epilogues) == (3, 1)


def test_the_counter_counts_operators_that_launch_kernels():
    x, index = torch.ones(3), torch.tensor([0, 2])

    def call():
        y = x[index] + x.view(3, 1)[:2, 0]  # two
        y[0] = 1.0  # one: a fill
        return y.to(torch.float32).double().sum()  # two: the first conversion does nothing

    found = launches.count(call)
    assert found.small == 5, found.operators
    assert found.waits == 0
    assert launches.count(lambda: torch.nonzero(x)).waits == 1
    assert launches.count(lambda: x.sum().item()).waits == 1
    asserted = launches.count(lambda: torch._assert_async(x[0]))
    assert (asserted.small, asserted.waits) == (1, 0)
