"""Values that do not fit stop the device: in the interpreter an error, on a GPU the end of its use.

Not for a GPU therefore: CONTRIBUTING.md leaves this file out there.
"""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob
from realign_kernels.testing import dense_logprob, make_head_inputs
from tests.realign_kernels.backends.triton.test_once import score_pairs

pytestmark = pytest.mark.usefixtures("small_blocks", "few_rows", "poison_empty")


def lengths_of(*last):
    return torch.tensor([[3, 3], [3, 3], last])


def test_labels_out_of_range_stop_the_device(monkeypatch):
    inputs = make_head_inputs(7, 11, 5, torch.float32)
    expected = dense_logprob(inputs.as_leaves(torch.float64)).detach()
    inputs.labels[3] = 11
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, V\) or ignore_index -100\."):
        inputs.call(linear_logprob, backend="triton")
    monkeypatch.setenv("REALIGN_CHECK", "0")
    actual = inputs.call(linear_logprob, backend="triton")
    assert actual[3].isnan()
    expected[3] = actual[3]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lengths": lengths_of(3, 4)},
            "the sum of sequence_lengths, must be",
        ),
        ({"lengths": lengths_of(4, 2)}, "sequence_lengths must equal"),
        ({"ids": torch.arange(18) // 3 + 1}, r"sequence_ids must be in \[0, 6\)"),
        ({"ids": torch.arange(18) // 3 - 1}, r"sequence_ids must be in \[0, 6\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_inconsistent_pair_arguments_stop_the_device(changes, message, is_sorted, monkeypatch):
    from realign_kernels.backends.triton import pairs

    monkeypatch.setattr(pairs, "SCANNED_TOKENS", 0 if is_sorted else 100)
    with pytest.raises(RuntimeError, match=message):
        score_pairs(**changes)
    monkeypatch.setenv("REALIGN_CHECK", "0")
    assert score_pairs(**changes).loss.isfinite()
