"""The kernels that pick and add rows, alone, against float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels.backends import triton as kernels
from realign_kernels.testing import seeded

pytestmark = pytest.mark.usefixtures("small_blocks", "poison_empty")

BLOCK = 4
# The dtype summed in, that of the operands, and one rounding of the former.
DTYPES = [
    (torch.float32, torch.float32, 2**-23),
    (torch.float32, torch.float16, 2**-23),
    (torch.float32, torch.bfloat16, 2**-23),
    (torch.float64, torch.float64, 2**-52),
    (torch.float64, torch.bfloat16, 2**-52),
]


def around(block):
    return (1, block - 1, block, block + 1, 2 * block + 3)


def normal(*shape, seed=0):
    return torch.randn(
        *shape,
        generator=seeded(seed),
        dtype=torch.float64,
    )


def strided(matrix, layout):
    """Return the same values, laid out in another way."""
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "padded":
        wide = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1] + 3), float("nan"))
        wide[:, : matrix.shape[1]] = matrix
        return wide[:, : matrix.shape[1]]
    return matrix


def rows_at(weight, ids):
    """Return ``weight[ids]`` in float64, and 0 where an id is not that of a row."""
    is_row = ((ids >= 0) & (ids < len(weight)))[:, None]
    return torch.where(is_row, weight.double()[torch.where(is_row[:, 0], ids, 0)], 0.0)


@pytest.mark.parametrize("D", around(BLOCK))
@pytest.mark.parametrize(("total", "operand", "rounding"), DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_label_dot_equals_float64(D, total, operand, rounding, layout):
    weight = strided(normal(9, D, seed=1).to(operand), layout)
    hidden = strided(normal(6, D).to(operand), "padded" if layout == "padded" else "plain")
    ids = torch.tensor([0, 8, -1, 9, -100, 4])
    out = normal(6, seed=2).to(total)
    expected = out.double() + (hidden.double() * rows_at(weight, ids)).sum(dim=1)
    bound = (
        (D + 2) * rounding * ((hidden.double() * rows_at(weight, ids)).abs().sum(dim=1) + out.abs())
    )
    untouched = out[2:5].clone()
    kernels.label_dot(hidden, weight, ids, out)
    assert ((out - expected).abs() <= bound).all()
    assert torch.equal(out[2:5], untouched)


@pytest.mark.parametrize("D", around(BLOCK))
@pytest.mark.parametrize(("total", "operand", "rounding"), DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_combine_equals_float64(D, total, operand, rounding, layout):
    weight = strided(normal(9, D, seed=1).to(operand), layout)
    accumulator = strided(normal(7, D).to(total), "padded" if layout == "padded" else "plain")
    ids = torch.tensor([0, 8, -1, 9, 3, -1, 5])
    scale = torch.tensor([1.0, 0.3, 0.5, 1.0, 0.0, 1.0, -2.0], dtype=total)
    coefficient = normal(7, seed=3).to(total)
    coefficient[2] = float("nan")  # not read without an id
    added = torch.where((ids >= 0) & (ids < 9), coefficient, 0).double()[:, None] * rows_at(
        weight, ids
    )
    scaled = scale.double()[:, None] * accumulator.double()
    kernels.combine(accumulator, scale, weight, ids, coefficient)
    bound = 3 * rounding * (scaled.abs() + added.abs())
    assert ((accumulator - scaled - added).abs() <= bound).all()


@pytest.mark.parametrize("V", around(BLOCK))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_combine_rescales_a_stash(V, dtype, rounding):
    whole = normal(5, V + 6).to(dtype)
    before, stash = whole.clone(), whole[:, 2 : V + 2]
    scale = torch.tensor([1.0, 0.25, 0.3, 0.0, 1.0])
    nowhere = torch.full((5,), -1)
    kernels.combine(stash, scale, stash[:0], nowhere, torch.zeros(5))
    expected = before[:, 2 : V + 2].double() * scale[:, None]
    # The interpreter cuts bfloat16 off, where a GPU rounds to nearest.
    assert ((stash - expected).abs() <= 2 * rounding * expected.abs() + 2**-24).all()
    assert torch.equal(stash[[0, 4]], before[[0, 4], 2 : V + 2])
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, V + 2 :], before[:, V + 2 :])


def test_combine_does_not_touch_rows_without_a_token():
    """A row of scale 1 without a token is not read, so that its NaN keeps its bits."""
    accumulator = torch.full((2, 5), float("nan"))
    bits = accumulator.view(torch.int32).clone().fill_(0x7FC12345)
    accumulator = bits.view(torch.float32).clone()
    ones = torch.ones(2)
    kernels.combine(accumulator, ones, torch.zeros(0, 5), torch.full((2,), -1), ones)
    assert torch.equal(accumulator.view(torch.int32), bits)


@pytest.mark.parametrize("D", around(BLOCK))
@pytest.mark.parametrize("V", around(BLOCK))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_add_entries_equals_float64(D, V, dtype, rounding):
    num_rows = 7
    generator = seeded(V)
    # Two entries a row, as labels and top tokens have; some belong to no row of this tile.
    ids = torch.randint(-1, V + 2, (2 * num_rows,), generator=generator)
    ids[3:8] = V - 1
    keys, order = torch.where((ids >= 0) & (ids < V), ids, V).sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(V + 1))
    coefficient, hidden = normal(2 * num_rows, seed=1).to(dtype), normal(num_rows, D).to(dtype)
    out = strided(normal(V, D, seed=2).to(dtype), "padded")
    expected, size = out.double().clone(), out.double().abs()
    for entry, v in enumerate(ids.tolist()):
        if 0 <= v < V:
            added = coefficient[entry].double() * hidden[entry % num_rows].double()
            expected[v] += added
            size[v] += added.abs()
    kernels.add_entries(out, starts, order, coefficient, hidden)
    assert ((out - expected).abs() <= 8 * rounding * size).all()


def test_add_entries_reads_its_part_of_the_starts():
    starts, order = torch.tensor([0, 1, 3, 3, 4]), torch.tensor([2, 0, 1, 3])
    out = torch.zeros(2, 1)
    kernels.add_entries(out, starts[1:4], order, torch.arange(1.0, 5.0), torch.ones(4, 1))
    assert out[:, 0].tolist() == [3.0, 0.0]


def test_row_kernels_accept_empty_inputs():
    empty, ids = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    kernels.label_dot(empty, torch.zeros(4, 3), ids, torch.zeros(0))
    kernels.combine(empty, torch.zeros(0), torch.zeros(4, 3), ids, torch.zeros(0))
    out = torch.ones(4, 3)
    kernels.add_entries(out, torch.zeros(5, dtype=torch.int64), ids, torch.zeros(0), empty)
    assert (out == 1).all()
