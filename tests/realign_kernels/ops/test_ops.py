"""The operators of torch: schemas, fakes, derivatives once, one graph under torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.library import opcheck

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.ops.pair_loss import PairArguments, pair_loss_backward_op, pair_loss_op
from realign_kernels.ops.rdpo_tiles import TileArguments, rdpo_tiles_op, scale_gradients_op
from realign_kernels.ops.score_tokens import (
    HeadArguments,
    ScoreArguments,
    scale_slopes_op,
    score_tokens_op,
)
from realign_kernels.testing import make_head_inputs, seeded

N, V, D = 11, 29, 6
BACKENDS = ["cpu", "eager"]
KEEPS = ["nothing", "slopes", "numbers", "stash", "stash if it fits"]
TERMS = [1.0, -1.0, 0.0, 0.0, 1.0, 0.1, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, 1.0, 0.1, 0.0, 0.0, 0.0]

# opcheck compiles; torch's own code warns there.
pytestmark = pytest.mark.filterwarnings("ignore")


def head_of(tensors, bias=None, lora_a=None, lora_b=None, backend="cpu", transform=(1.0, 4.0, 1.5)):
    hidden, weight = tensors
    return HeadArguments(
        hidden, weight, bias, lora_a, lora_b, lora_scaling=0.5, transform=list(transform),
        autocast_dtype=None, backend=backend, budget=[1 << 14, 1 << 20], group_name=None,
    )  # fmt: skip


def head_arguments(
    *, keeps="slopes", statistics=False, top=False, dtype=torch.float64, rank=2, bias=True,
    backend="cpu",
):  # fmt: skip
    inputs = make_head_inputs(N, V, D, dtype, bias=bias, rank=rank, ignored=0.3)
    needs_head = keeps not in ("nothing", "slopes")
    hidden, weight, *others = inputs.tensors
    hidden.requires_grad_(keeps != "nothing")
    for tensor in (weight, *others):
        tensor.requires_grad_(needs_head)
    bias_tensor = others.pop(0) if bias else None
    lora_a, lora_b = others if rank else (None, None)
    top_rows = torch.arange(N) % 2 == 0 if top else None
    arguments = ScoreArguments(
        labels=inputs.labels, top_rows=top_rows, sequence_lengths=None, ignore_index=-100,
        keeps=keeps, with_statistics=statistics, label_shape=[N], witness=None,
    )  # fmt: skip
    return *head_of((hidden, weight), bias_tensor, lora_a, lora_b, backend), *arguments


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_head(backend, keeps, dtype):
    """K02."""
    arguments = head_arguments(keeps=keeps, dtype=dtype, backend=backend)
    opcheck(score_tokens_op, arguments, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("keeps", ["slopes", "stash"])
@pytest.mark.parametrize("options", [{"statistics": True}, {"top": True}], ids=str)
def test_opcheck_of_statistics_and_top_tokens(options, keeps):
    opcheck(score_tokens_op, head_arguments(keeps=keeps, **options))


def test_opcheck_without_optional_inputs():
    opcheck(score_tokens_op, head_arguments(rank=0, bias=False))


def pair_arguments(*, packed, backend):
    generator = seeded(0)
    token_logps = -torch.rand(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (6, 4), generator=generator)
    labels[:, 3] = -100
    ids = torch.arange(6)[:, None].expand(6, 4)
    if packed:
        token_logps, labels, ids = (part.reshape(-1) for part in (token_logps, labels, ids))
    batch = PairArguments(
        labels=labels, sequence_ids=ids.contiguous() if packed else None,
        sequence_lengths=torch.full((3, 2), 3), ref_logps=torch.randn(3, 2, generator=generator),
        ignore_index=-100, pair_shape=[3, 2], terms=TERMS, nll_weight=0.1,
    )  # fmt: skip
    return token_logps.clone().requires_grad_(), backend, *batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_pair_loss(backend, packed):
    opcheck(pair_loss_op, pair_arguments(packed=packed, backend=backend))


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_tiles(backend, top):
    inputs = make_head_inputs(12, V, D, bias=True, rank=2, ignored=0.2)
    inputs.labels[:2] = 1
    hidden, weight, *others = (tensor.requires_grad_() for tensor in inputs.tensors)
    sequence_ids = torch.arange(12) % 6
    batch = PairArguments(
        labels=inputs.labels, sequence_ids=sequence_ids, sequence_lengths=None,
        ref_logps=torch.zeros(3, 2), ignore_index=-100, pair_shape=[3, 2], terms=TERMS,
        nll_weight=0.0,
    )  # fmt: skip
    arguments = TileArguments(
        top_rows=sequence_ids >= 2 if top else None, needed=[True] * 5, label_shape=[12],
        witness=None,
    )  # fmt: skip
    head = head_of((hidden, weight), *others, backend=backend, transform=(1.0, 0.0, 1.0))
    opcheck(rdpo_tiles_op, (*head, *batch, *arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_tiles_with_weights_and_statistics(backend):
    inputs = make_head_inputs(12, V, D)
    hidden, weight = (tensor.requires_grad_() for tensor in inputs.tensors)
    batch = PairArguments(
        labels=inputs.labels, sequence_ids=torch.arange(12) % 6, sequence_lengths=None,
        ref_logps=torch.zeros(3, 2), ignore_index=-100, pair_shape=[3, 2], terms=TERMS,
        nll_weight=0.0,
    )  # fmt: skip
    arguments = TileArguments(
        top_rows=None, needed=[True, True, False, False, False], label_shape=[12], witness=None,
        token_weights=torch.linspace(0, 1, 12), with_statistics=True,
    )  # fmt: skip
    opcheck(rdpo_tiles_op, (*head_of((hidden, weight), backend=backend), *batch, *arguments))


def test_opcheck_of_the_backwards():
    labels = torch.tensor([1, -100, 2])
    slopes = torch.randn(2, 4), torch.empty(0), torch.tensor([0, 2]), [3, 4], torch.bfloat16, None
    opcheck(scale_slopes_op, (torch.ones(3), None, *slopes, "cpu"))
    opcheck(scale_gradients_op, (torch.tensor(2.0), [torch.randn(3), torch.randn(2, 2)],
                                 [0, 3], None))  # fmt: skip
    grads = torch.tensor(1.0), torch.ones(3, 1)
    opcheck(pair_loss_backward_op, (*grads, torch.ones(3, 1).double(), labels[:, None], None, -100,
                                    torch.float32, "cpu"))  # fmt: skip


def test_an_older_compiler_can_trace_the_arguments_of_a_head():
    """torch.compile of PyTorch 2.10 knows no property of a named tuple."""
    assert not [name for name, value in vars(HeadArguments).items() if isinstance(value, property)]


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_head_compiles_into_one_graph(backend, frozen, memory):
    """K22."""
    inputs = make_head_inputs(37, 101, 24, torch.float32, bias=True, ignored=0.2).as_leaves()
    if frozen:
        for tensor in inputs.tensors[1:]:
            tensor.requires_grad_(False)

    def square(hidden_states, weight, bias):
        logps = linear_logprob(
            hidden_states * 2, weight, inputs.labels, lm_head_bias=bias, memory=memory,
            backend=backend,
        )  # fmt: skip
        return logps.square()

    tensors = [tensor for tensor in inputs.tensors if tensor.requires_grad]
    expected = square(*inputs.tensors)
    expected_grads = torch.autograd.grad(expected.sum(), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
    actual = compiled(*inputs.tensors)
    assert torch.equal(actual, expected)
    for grad, oracle in zip(
        torch.autograd.grad(actual.sum(), tensors), expected_grads, strict=True
    ):
        assert torch.equal(grad, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_compiles_into_one_graph_for_any_length(backend):
    """K22: padded and packed, with lengths, and no more than one recompilation by length."""
    torch._dynamo.reset()
    weight = torch.randn(50, 8)

    def loss(hidden_states, labels, ref_logps, sequence_ids, sequence_lengths):
        return rdpo_loss(
            hidden_states, weight, labels, ref_logps, sequence_ids=sequence_ids,
            sequence_lengths=sequence_lengths, backend=backend,
        ).loss  # fmt: skip

    compilations = []

    def count(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for length in (12, 18, 24, 30, 42):
        hidden_states = torch.randn(length, 8, requires_grad=True)
        labels = torch.randint(50, (length,))
        ids = torch.arange(length) % 6
        arguments = (hidden_states, labels, torch.zeros(3, 2), ids, torch.full((3, 2), length // 6))
        actual, expected = compiled(*arguments), loss(*arguments)
        assert torch.equal(actual, expected)
        (grad,) = torch.autograd.grad(actual, hidden_states)
        assert torch.equal(grad, torch.autograd.grad(expected, hidden_states)[0])
    assert len(compilations) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["stash", "recompute", "tile"])
def test_a_second_derivative_in_the_weight_is_refused(memory, backend):
    """K21, where the body is frozen."""
    hidden_states, labels = torch.randn(6, 3, 8), torch.randint(20, (6, 3))
    weight = torch.randn(20, 8, requires_grad=True)
    loss = rdpo_loss(
        hidden_states, weight, labels, torch.zeros(3, 2), memory=memory, backend=backend
    ).loss
    (grad,) = torch.autograd.grad(loss + weight.pow(3).sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiated once.*Drop create_graph=True"):
        torch.autograd.grad(grad.sum(), weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["auto", "stash", "tile"])
def test_a_second_derivative_is_refused(memory, backend):
    """K21: also where other terms have one, which alone would be a wrong number."""
    hidden_states = torch.randn(6, 3, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=memory != "auto")
    labels = torch.randint(20, (6, 3))
    loss = rdpo_loss(
        hidden_states, weight, labels, torch.zeros(3, 2), memory=memory, backend=backend
    ).loss
    total = loss + hidden_states.pow(3).sum()
    (grad,) = torch.autograd.grad(total, hidden_states, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"differentiated once.*Drop create_graph=True"):
        torch.autograd.grad(grad.sum(), hidden_states)


def test_a_frozen_head_keeps_no_hidden_states_for_the_backward():
    """The derivative replaces the hidden states until the backward, since the head is frozen."""
    import gc
    import weakref

    source = torch.randn(64, 32, requires_grad=True)
    hidden_states = source * 1.0
    storage = weakref.ref(hidden_states)
    logps = linear_logprob(hidden_states, torch.randn(20, 32), torch.randint(20, (64,)))
    del hidden_states
    gc.collect()
    assert storage() is None
    logps.sum().backward()


def test_statistics_compile_into_one_graph():
    inputs = make_head_inputs(9, 23, 4, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda hidden: linear_logprob_stats(hidden, inputs.lm_head_weight, inputs.labels),
        fullgraph=True,
        backend="aot_eager",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = compiled(inputs.hidden_states)
    torch.testing.assert_close(actual, inputs.call(linear_logprob_stats))


def test_transposed_labels_compile():
    """The result of an operator has the strides that tracing expects."""
    hidden_states = torch.randn(6, 4, 8, requires_grad=True)
    weight, labels = torch.randn(20, 8), torch.randint(20, (4, 6)).T
    torch._dynamo.reset()

    def loss(hidden_states):
        return rdpo_loss(hidden_states, weight, labels, torch.zeros(3, 2)).loss

    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden_states)
    (grad,) = torch.autograd.grad(actual, hidden_states)
    assert torch.equal(grad, torch.autograd.grad(loss(hidden_states), hidden_states)[0])
