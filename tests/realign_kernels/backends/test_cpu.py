"""The C++ kernels get the dtypes and layouts that they can read, and no others."""

from __future__ import annotations

import pytest
import torch

from realign_kernels.backends import cpu
from realign_kernels.backends.kernel_set import RowState, Tile
from realign_kernels.head import LogitTransform
from realign_kernels.testing import seeded

IDS = torch.arange(4)
ONES = torch.ones(4)
SQUARE = torch.ones(4, 4)
HALF = SQUARE.bfloat16()
COLUMN = torch.ones(4, 1)


@pytest.mark.parametrize("num_tops", [0, 5])
def test_bfloat16_entries_are_added_accurately(num_tops):
    generator = seeded(0)
    ids, order = torch.randint(9, (5 + num_tops,), generator=generator).sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(10))[2:8]
    coefficient = torch.randn(len(order), generator=generator)
    hidden = torch.randn(5, 7, generator=generator).bfloat16()
    actual, expected = torch.ones(5, 7), torch.ones(5, 7)
    cpu.add_entries(actual, starts, order, coefficient, hidden)
    cpu.add_entries(expected, starts, order, coefficient, hidden.float())
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, torch.ones(5, 7))


def fold(**changes):
    values = {
        "logits": SQUARE.clone(), "exponentials": None, "first_column": 0, "bias": None,
        "labels": IDS, "transform": LogitTransform(1.0, None, 1.0), "bound": 60.0,
        "state": RowState(ONES.clone(), ONES.clone()),
    }  # fmt: skip
    cpu.epilogue(Tile(**(values | changes)))


# One argument each that C would take for another dtype, or read past.
MISREAD = {
    "label_dot in half": lambda: cpu.label_dot(SQUARE.half(), SQUARE, IDS, ONES.clone()),
    "label_dot into double": lambda: cpu.label_dot(HALF, SQUARE, IDS, ONES.double()),
    "label_dot of columns": lambda: cpu.label_dot(torch.ones(4, 8)[:, ::2], SQUARE, IDS, ONES),
    "label_dot by int32": lambda: cpu.label_dot(SQUARE, SQUARE, IDS.int(), ONES.clone()),
    "combine by double": lambda: cpu.combine(SQUARE, ONES.double(), SQUARE, IDS, ONES),
    "combine into half": lambda: cpu.combine(HALF, ONES, SQUARE, IDS, ONES),
    "combine spread": lambda: cpu.combine(SQUARE, ONES[:1].expand(4), SQUARE, IDS, ONES),
    "entries in half": lambda: cpu.add_entries(SQUARE, IDS, IDS, ONES, SQUARE.half()),
    "entries by double": lambda: cpu.add_entries(SQUARE, IDS, IDS, ONES.double(), SQUARE),
    "column by double": lambda: cpu.product(COLUMN, SQUARE, COLUMN.double(), adds=False),
    "half by column": lambda: cpu.product(COLUMN, HALF, COLUMN, adds=False),
    "product into half": lambda: cpu.product(HALF, HALF, HALF, adds=False),
    "product of double": lambda: cpu.product(SQUARE, SQUARE.double(), HALF, adds=False),
    "totals in double": lambda: cpu.exponential_product(
        SQUARE, SQUARE, HALF, ONES.double(), adds=False
    ),
    "exponentials in half": lambda: cpu.exponential_product(SQUARE, HALF, HALF, ONES, adds=False),
    "tile in half": lambda: fold(logits=HALF),
    "bias in double": lambda: fold(bias=ONES.double()),
    "bias spread": lambda: fold(bias=torch.ones(1).expand(4)),
    "sums in double": lambda: fold(state=RowState(ONES, ONES.double())),
    "labels spread": lambda: fold(labels=torch.arange(8)[::2]),
}


@pytest.mark.parametrize("name", MISREAD)
def test_tensors_the_cpu_kernels_would_misread_are_rejected(name):
    with pytest.raises(AssertionError):
        MISREAD[name]()
