"""The value of linear_logprob against closed forms, torch's own operators and hand-made edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from realign_kernels import linear_logprob
from realign_kernels.testing import dense_logprob, make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

INF, NAN = float("inf"), float("nan")

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "lora": {"rank": 3},
    "bias+lora": {"bias": True, "rank": 3},
}
TRANSFORMS = {
    "identity": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"logit_softcap": 2.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": 1.7, "logit_softcap": 5.0, "temperature": 1.3},
}


def from_logits(logits, labels, **options):
    """Call with an identity head, so that the logits are exactly those given."""
    logits = torch.as_tensor(logits)
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    # An infinite logit cannot come out of a product with the identity's zeros; the bias carries it.
    bias = torch.zeros_like(logits[0])
    is_infinite = ~torch.isfinite(logits[0])
    bias[is_infinite] = logits[0][is_infinite]
    hidden_states = torch.where(torch.isfinite(logits), logits, 0.0)
    return linear_logprob(
        hidden_states, head, torch.as_tensor(labels), lm_head_bias=bias, **options
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.usefixtures("small_tiles")
def test_linear_logprob_equals_log_softmax_of_dense_logits(head, transform):
    inputs = make_head_inputs(11, 37, 5, ignored=0.2, **head, **transform)
    actual = inputs.call(linear_logprob)
    torch.testing.assert_close(actual, dense_logprob(inputs))


def test_linear_logprob_equals_torch_cross_entropy():
    inputs = make_head_inputs(9, 23, 4, ignored=0.3, bias=True)
    logits = F.linear(inputs.hidden_states, inputs.lm_head_weight, inputs.options["lm_head_bias"])
    expected = -F.cross_entropy(logits, inputs.labels, reduction="none")
    torch.testing.assert_close(inputs.call(linear_logprob), expected)


@pytest.mark.parametrize("V", [1, 2, 31, 1000])
def test_equal_logits_give_minus_log_of_vocabulary(V):
    token_logps = linear_logprob(torch.zeros(3, 2), torch.zeros(V, 2), torch.tensor([0, V - 1, 0]))
    torch.testing.assert_close(token_logps, torch.full((3,), -math.log(V)))


def test_two_token_vocabulary_equals_log_sigmoid():
    gaps = torch.tensor([-80.0, -1.5, 0.0, 3.0, 40.0], dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    actual = from_logits(logits, [0] * 5)
    torch.testing.assert_close(actual, F.logsigmoid(gaps), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 4), (0,), (3, 0)])
def test_any_leading_shape_is_accepted(shape):
    inputs = make_head_inputs(math.prod(shape), 13, 4)
    hidden_states, labels = inputs.hidden_states.view(*shape, 4), inputs.labels.view(shape)
    actual = linear_logprob(hidden_states, inputs.lm_head_weight, labels)
    assert actual.shape == shape
    torch.testing.assert_close(actual.flatten(), dense_logprob(inputs))


def test_one_token_vocabulary_is_certain():
    inputs = make_head_inputs(5, 1, 4)
    assert torch.equal(inputs.call(linear_logprob), torch.zeros(5, dtype=torch.float64))


def test_ignored_positions_are_zero_for_any_hidden_state():
    inputs = make_head_inputs(6, 13, 4)
    inputs.labels[[1, 4]] = -100
    inputs.hidden_states[[1, 4]] = NAN
    torch.testing.assert_close(inputs.call(linear_logprob)[[1, 4]].tolist(), [0.0, 0.0])
    assert torch.isfinite(inputs.call(linear_logprob)).all()


def test_a_batch_of_ignored_labels_gives_zeros():
    inputs = make_head_inputs(6, 13, 4, ignored=1.0)
    assert torch.equal(inputs.call(linear_logprob), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("ignore_index", [-1, 0, 12])
def test_any_ignore_index_is_accepted(ignore_index):
    inputs = make_head_inputs(40, 13, 4, ignored=0.2, ignore_index=ignore_index)
    actual = inputs.call(linear_logprob)
    torch.testing.assert_close(actual, dense_logprob(inputs))
    assert (actual[inputs.labels == ignore_index] == 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_memory_layout_of_inputs_does_not_matter(layout, seed):
    inputs = make_head_inputs(8, 13, 6, seed=seed)
    hidden_states, weight, labels = inputs.hidden_states, inputs.lm_head_weight, inputs.labels
    if layout == "sliced":
        hidden_states = hidden_states.repeat_interleave(2, dim=1)[:, ::2].view(2, 4, 6)[:, :-1]
        labels = labels.view(2, 4)[:, :-1]
    elif layout == "transposed":
        weight = weight.T.contiguous().T
    elif layout == "expanded":
        hidden_states = hidden_states[:1].expand(8, 6)
    else:
        hidden_states = torch.cat([torch.zeros(1, 6), hidden_states])[1:]
    actual = linear_logprob(hidden_states, weight, labels)
    expected = linear_logprob(hidden_states.contiguous(), weight.contiguous(), labels.contiguous())
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("position", [0, 5, 15, 16, 17, 36])
@pytest.mark.usefixtures("small_tiles")
def test_minus_infinity_in_the_bias_removes_a_token(position):
    inputs = make_head_inputs(7, 37, 5, bias=True)
    inputs.options["lm_head_bias"][position] = -INF
    actual = inputs.call(linear_logprob)
    torch.testing.assert_close(actual, dense_logprob(inputs))


@pytest.mark.parametrize("removed", [slice(0, 16), slice(16, 32), slice(32, 37), slice(0, 36)])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_of_minus_infinity_add_nothing(removed):
    inputs = make_head_inputs(7, 37, 5, bias=True)
    inputs.options["lm_head_bias"][removed] = -INF
    actual = inputs.call(linear_logprob)
    torch.testing.assert_close(actual, dense_logprob(inputs))


def test_impossible_and_certain_labels_give_minus_infinity_and_zero():
    logits = [[-INF, 0.0, -INF], [0.0, 0.0, 0.0]]
    assert from_logits(logits[:1], [0]).item() == -INF
    assert from_logits(logits[:1], [1]).item() == 0.0


@pytest.mark.parametrize("logits", [[-INF, -INF, -INF], [INF, 0.0, 0.0], [0.0, INF, 0.0]])
def test_rows_without_a_distribution_are_nan(logits):
    assert math.isnan(from_logits([logits], [0]).item())


@pytest.mark.usefixtures("small_tiles")
def test_nan_stays_in_its_row():
    inputs = make_head_inputs(7, 37, 5)
    inputs.hidden_states[3] = NAN
    actual = inputs.call(linear_logprob)
    assert torch.isnan(actual).tolist() == [row == 3 for row in range(7)]


def test_logits_beyond_half_precision_do_not_overflow():
    """Logits of 1e6 do not fit in float16; only tiles in float32 see them."""
    hidden_states = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float16)
    weight = torch.tensor([[1000.0], [999.5]], dtype=torch.float16)
    actual = linear_logprob(hidden_states, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(actual, torch.tensor([0.0, -500.0]), rtol=1e-6, atol=0)


def test_confident_rows_keep_their_relative_accuracy():
    """log p is about -e**-gap there: far below one unit in the last place of the normaliser."""
    gaps = torch.tensor([5.0, 17.0, 30.0, 60.0, 85.0])
    logits = torch.stack([gaps, torch.zeros_like(gaps), torch.zeros_like(gaps)], dim=1)
    expected = -torch.log1p(2 * torch.exp(-gaps.double()))
    actual = from_logits(logits, [0] * 5).double()
    # Half a unit in the last place of a gap of 85 is 4e-6, and that is the relative error here.
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)


def test_two_runs_are_equal():
    inputs = make_head_inputs(33, 97, 8, torch.float32, bias=True, rank=2)
    assert torch.equal(inputs.call(linear_logprob), inputs.call(linear_logprob))


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_every_memory_mode_and_backend_gives_the_same_value(memory, backend):
    inputs = make_head_inputs(9, 23, 4)
    expected = inputs.call(linear_logprob, backend=backend)
    leaves = inputs.as_leaves()  # what is kept for a backward changes no value
    assert torch.equal(leaves.call(linear_logprob, memory=memory, backend=backend), expected)
