"""The operators of torch on the Triton backend: schemas, fakes, one graph, one derivative."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from realign_kernels import rdpo_loss
from realign_kernels.backends import triton as kernels
from realign_kernels.ops.pair_loss import PairArguments, pair_loss_backward_op, pair_loss_op
from realign_kernels.ops.score_tokens import (
    HeadArguments,
    ScoreArguments,
    scale_slopes_op,
    score_tokens_op,
)
from realign_kernels.testing import make_head_inputs, seeded
from realign_kernels.tiling import TileShape

# opcheck compiles; torch's own code warns there.
pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.filterwarnings("ignore")]

TERMS = [1.0, -1.0, 0.0, 0.0, 1.0, 0.1, 0.0, 0.0, 0.0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Fill up to a few rows: the interpreter takes a row at a time."""
    monkeypatch.setattr(kernels, "LARGEST_TILE", TileShape(4, 8))


@pytest.mark.parametrize("keeps", ["nothing", "slopes", "numbers", "stash"])
def test_opcheck_of_the_head(keeps):
    inputs = make_head_inputs(4, 7, 3, torch.float32, bias=True)
    inputs.labels[1] = -100
    hidden, weight, bias = inputs.tensors
    hidden.requires_grad_(keeps != "nothing")
    weight.requires_grad_(keeps in ("numbers", "stash"))
    head = HeadArguments(
        hidden, weight, bias, None, None, lora_scaling=1.0, transform=[1.0, 4.0, 1.5],
        autocast_dtype=None, backend="triton", budget=[1 << 20, 1 << 20], group_name=None,
        rounds_factors=False,
    )  # fmt: skip
    arguments = ScoreArguments(
        labels=inputs.labels, top_rows=None, sequence_lengths=None, ignore_index=-100, keeps=keeps,
        with_statistics=False, label_shape=[4], witness=None,
    )  # fmt: skip
    opcheck(score_tokens_op, (*head, *arguments), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_pair_loss(packed):
    token_logps = -torch.rand(4, 3, generator=seeded(0))
    labels, ids = torch.ones(4, 3, dtype=torch.int64), torch.arange(4)[:, None].expand(4, 3)
    if packed:
        token_logps, labels, ids = (part.reshape(-1) for part in (token_logps, labels, ids))
    batch = PairArguments(
        labels=labels, sequence_ids=ids.contiguous() if packed else None,
        sequence_lengths=torch.full((2, 2), 3, device="cpu"), ref_logps=torch.zeros(2, 2),
        ignore_index=-100, pair_shape=[2, 2], terms=TERMS, nll_weight=0.1,
    )  # fmt: skip
    opcheck(pair_loss_op, (token_logps.clone().requires_grad_(), "triton", *batch))


def test_opcheck_of_the_backwards():
    slopes = torch.randn(2, 4), torch.empty(0), torch.tensor([0, 2]), [3, 4], torch.float16, None
    opcheck(scale_slopes_op, (torch.ones(3), None, *slopes, "triton"))
    grads = torch.tensor(1.0), torch.ones(3, 1), torch.ones(3, 1).double()
    labels = torch.tensor([[1], [-100], [2]])
    opcheck(pair_loss_backward_op, (*grads, labels, None, -100, torch.float32, "triton"))


@pytest.mark.parametrize(
    ("packed", "knows"),
    [
        (False, True),
        (True, False),
        pytest.param(False, False, marks=pytest.mark.full),
        pytest.param(True, True, marks=pytest.mark.full),
    ],
)
def test_the_loss_compiles_into_one_graph(packed, knows):
    torch._dynamo.reset()
    hidden = torch.randn(6, 3, 5, generator=seeded(0)).requires_grad_()
    weight, labels = torch.randn(11, 5, generator=seeded(1)), torch.arange(18).view(6, 3) % 11
    lengths = torch.full((3, 2), 3, device="cpu") if knows else None
    ids = torch.arange(6).repeat_interleave(3) if packed else None

    def loss(hidden):
        flat = (hidden.view(-1, 5), weight, labels.view(-1)) if packed else (hidden, weight, labels)
        return rdpo_loss(
            *flat, torch.zeros(3, 2), sequence_ids=ids, sequence_lengths=lengths, backend="triton"
        ).loss

    actual, expected = (
        torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden),
        loss(hidden),
    )
    assert torch.equal(actual, expected)
    (grad,) = torch.autograd.grad(actual, hidden)
    assert torch.equal(grad, torch.autograd.grad(expected, hidden)[0])


def test_a_second_derivative_is_refused():
    hidden = torch.randn(6, 2, 5, generator=seeded(0)).requires_grad_()
    weight, labels = torch.randn(11, 5, generator=seeded(1)), torch.arange(12).view(6, 2) % 11
    loss = rdpo_loss(hidden, weight, labels, torch.zeros(3, 2), backend="triton").loss
    (grad,) = torch.autograd.grad(loss + hidden.pow(3).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiated once.*Drop create_graph=True"):
        torch.autograd.grad(grad.sum(), hidden)
