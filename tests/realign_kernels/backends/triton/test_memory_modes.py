"""Every way to a gradient of the preference loss on the Triton backend, against float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import Objective, rdpo_loss
from realign_kernels.backends import triton as kernels
from realign_kernels.testing import HeadInputs, dense_rdpo_loss, make_head_inputs
from realign_kernels.tiling import TileShape

NUM_CELLS, NUM_PAIRS, NUM_POSITIONS = 3, 4, 2
NUM_ROWS = NUM_CELLS * NUM_PAIRS * NUM_POSITIONS
MODES = ["stash", "recompute", "tile"]
pytestmark = pytest.mark.usefixtures("few_rows")
# relative errors by dtype: one rounding of the result, and that of the operands before it; the
# interpreter cuts bfloat16 off, which is twice the error of rounding
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-6,
}


def preference_batch(dtype, vocabulary, hidden_size, *, logit_std, size=1.0, **options):
    """A batch whose hidden states have a size; its logits do not depend on it."""
    inputs = make_head_inputs(
        NUM_ROWS, vocabulary, hidden_size, torch.float64, logit_std=logit_std, **options
    )
    hidden, weight, *others = inputs.tensors
    inputs = inputs.replace_tensors([hidden * size, weight / size, *others])
    inputs = inputs.replace_tensors([tensor.to(dtype) for tensor in inputs.tensors])
    ref_logps = torch.linspace(-1.0, 1.0, NUM_CELLS * NUM_PAIRS).view(NUM_CELLS, NUM_PAIRS)
    return inputs, ref_logps - NUM_POSITIONS * torch.log(torch.tensor(float(vocabulary)))


def in_pairs(inputs):
    """The same call, with a dimension for sequences."""
    shape = NUM_CELLS * NUM_PAIRS, NUM_POSITIONS
    hidden, *others = inputs.tensors
    padded = inputs.replace_tensors([hidden.reshape(*shape, -1), *others])
    return HeadInputs(*padded.tensors[:2], inputs.labels.reshape(shape), padded.options)


def gradients(inputs, ref_logps, memory, scale):
    leaves = inputs.as_leaves()
    padded = in_pairs(leaves)
    loss = rdpo_loss(
        padded.hidden_states, padded.lm_head_weight, padded.labels, ref_logps, memory=memory,
        backend="triton", **padded.options,
    ).loss  # fmt: skip
    return torch.autograd.grad(loss * scale, leaves.tensors)


def dense_gradients(inputs, ref_logps, scale):
    exact = inputs.as_leaves(torch.float64)
    loss = dense_rdpo_loss(in_pairs(exact), ref_logps, Objective.rdpo()).loss
    return torch.autograd.grad(loss * scale, exact.tensors)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16]
    + [pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.float32, torch.float64)],
    ids=str,
)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_of_every_memory_mode_equal_float64(dtype, memory, monkeypatch):
    """The batch has several groups of pairs, tiles and blocks, and a head with all options."""
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 13)
    monkeypatch.setattr(kernels, "LARGEST_TILE", TileShape(4, 8))
    inputs, ref_logps = preference_batch(
        dtype, 18, 5, logit_std=2.0, bias=True, rank=2, logit_softcap=6.0, temperature=1.2
    )
    # A slope of 64 keeps results off the smallest numbers of float16.
    actual = gradients(inputs, ref_logps, memory, 64.0)
    expected = dense_gradients(inputs, ref_logps, 64.0)
    for ours, oracle in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, oracle) <= BOUNDS[dtype]


@pytest.mark.parametrize("memory", MODES)
def test_gradients_of_non_label_tokens_are_accurate_in_float16(memory):
    """Their gradients are thousands of times smaller than those of labels, and scaled by the loss
    only after they are summed where tiles are taken.
    """
    vocabulary, scale = 4096, 65536.0
    inputs, ref_logps = preference_batch(
        torch.float16, vocabulary, 16, logit_std=0.05, size=0.05, bias=True
    )
    inputs.options["lm_head_bias"].mul_(0.05)
    hidden, weight, bias = gradients(inputs, ref_logps, memory, scale)
    expected = dense_gradients(inputs, ref_logps, scale)
    has_label = torch.zeros(vocabulary, dtype=torch.bool)
    has_label[inputs.labels] = True
    bound = BOUNDS[torch.float16]
    assert relative_error(hidden, expected[0]) <= bound
    for rows in (has_label, ~has_label):
        assert relative_error(weight[rows], expected[1][rows]) <= bound
    # Chosen and rejected tokens nearly cancel in the bias, and their rounding does not.
    assert relative_error(bias[has_label], expected[2][has_label]) <= bound
    assert relative_error(bias[~has_label], expected[2][~has_label]) <= 8 * bound


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_row_gives_a_nan_gradient_in_float16(value):
    """A gradient scaler detects overflows by such gradients."""
    inputs, ref_logps = preference_batch(torch.float16, 32, 8, logit_std=1.0)
    inputs.hidden_states[5, 0] = value
    assert not gradients(inputs, ref_logps, "tile", 1.0)[1].isfinite().all()


def test_pair_groups_with_gradients_of_different_scale_are_accurate(monkeypatch):
    """Learned pairs have tiny slopes, so their group is summed with its own scale."""
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 6)
    inputs, ref_logps = preference_batch(torch.float16, 256, 8, logit_std=0.5)
    ref_logps[0, :2] -= 120.0  # rewards of 12: slopes of 6e-7 instead of 0.05
    actual = gradients(inputs, ref_logps, "tile", 65536.0)
    expected = dense_gradients(inputs, ref_logps, 65536.0)
    learned = torch.zeros(NUM_CELLS, NUM_PAIRS, NUM_POSITIONS, dtype=torch.bool)
    learned[:, :2] = True
    rows = learned.reshape(-1)
    for part in (rows, ~rows):
        assert relative_error(actual[0][part], expected[0][part]) <= BOUNDS[torch.float16]
    only = torch.zeros(256, dtype=torch.bool)
    only[inputs.labels[rows]] = True
    only[inputs.labels[~rows]] = False
    assert relative_error(actual[1][~only], expected[1][~only]) <= BOUNDS[torch.float16]
