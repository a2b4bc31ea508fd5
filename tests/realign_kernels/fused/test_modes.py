"""Every way to a gradient agrees with the dense formula, row by row."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.utils.checkpoint

from realign_kernels import Objective, Term, linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.backends.dispatch import resolve_backend
from realign_kernels.ops.rdpo_tiles import rdpo_tiles_op
from realign_kernels.testing import (
    HeadInputs,
    dense_log_probs,
    dense_logprob,
    dense_rdpo_loss,
    make_head_inputs,
    seeded,
)

MODES = ["auto", "stash", "recompute"]
TRANSFORMS = [{}, {"logit_softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}]
# A few columns and rows a tile, so that rows move between tiles.
WORKSPACE_BYTES = 1 << 13


def freeze_head(inputs):
    for tensor in inputs.tensors[1:]:
        tensor.requires_grad_(False)
    return inputs


def test_auto_runs_the_fused_backend():
    assert resolve_backend("auto", "cpu") == "cpu"


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcapped"])
@pytest.mark.parametrize("memory", MODES)
def test_gradients_of_every_memory_mode_equal_the_dense_formula(memory, transform, frozen):
    inputs = make_head_inputs(37, 101, 24, bias=True, rank=3, ignored=0.3, **transform)
    ours, dense = inputs.as_leaves(), inputs.as_leaves()
    if frozen:
        freeze_head(ours)
    upstream = torch.linspace(-2, 1, 37, dtype=torch.float64)
    ours.call(
        linear_logprob, backend="cpu", memory=memory, workspace_bytes=WORKSPACE_BYTES
    ).backward(upstream)
    dense_logprob(dense).backward(upstream)
    for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, oracle.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("memory", MODES)
def test_gradients_of_the_top_token_equal_the_dense_formula(memory, frozen):
    inputs = make_head_inputs(29, 83, 12, bias=True, rank=2, logit_softcap=6.0)
    ours, dense = inputs.as_leaves(), inputs.as_leaves()
    if frozen:
        freeze_head(ours)
    scores = ours.call(
        linear_logprob_stats, backend="cpu", memory=memory, workspace_bytes=WORKSPACE_BYTES
    )
    log_probs = dense_log_probs(dense)
    label = log_probs.gather(1, inputs.labels[:, None]).squeeze(1)
    others = log_probs.scatter(1, inputs.labels[:, None], -torch.inf)
    top = others.amax(dim=1)
    up_label, up_top = torch.linspace(-1, 1, 29).double(), torch.linspace(2, -1, 29).double()
    ((scores.token_logps * up_label) + (scores.top_non_label_logps * up_top)).sum().backward()
    ((label * up_label) + (top * up_top)).sum().backward()
    torch.testing.assert_close(scores.top_non_label_ids, others.argmax(dim=1))
    for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, oracle.grad, rtol=1e-10, atol=1e-11)


def far_below(gap, dtype):
    """Return inputs whose labels lie ``gap`` nats below a late token, after two lower peaks."""
    inputs = make_head_inputs(33, 97, 16, dtype, logit_std=1.0, bias=True)
    inputs.labels[:] = torch.arange(33) % 40
    for token, height in ((50, 0.4), (70, 0.7), (96, 1.0)):
        inputs.options["lm_head_bias"][token] = gap * height
    return inputs


@pytest.mark.parametrize("gap", [70.0, 200.0, 1e4])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("memory", MODES)
def test_rows_whose_shift_moves_equal_the_dense_formula(memory, frozen, gap):
    """The logits exceed the guard of 60 nats more than once in a row."""
    inputs = far_below(gap, torch.float32)
    ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    if frozen:
        freeze_head(ours)
    actual = ours.call(linear_logprob, backend="cpu", memory=memory, workspace_bytes=1 << 12)
    expected = dense_logprob(dense)
    assert ((actual - expected).abs() <= 1e-5 + 1e-6 * expected.abs()).all()
    actual.sum().backward()
    expected.sum().backward()
    for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), oracle.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("miss", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("scored", ["label", "top"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_confident_rows_keep_their_gradient(frozen, scored, miss):
    """K06: a relative error of 0.5 % where p is 1 - miss, for the label and for the best other."""
    inputs = make_head_inputs(12, 301, 32, torch.bfloat16, logit_std=1.0)
    favourite = inputs.labels if scored == "label" else (inputs.labels + 150) % 301
    # Along its own direction, each row's favourite rises until the others share `miss`.
    hidden = inputs.hidden_states.double()
    weight = inputs.lm_head_weight.double()
    lift = -torch.log(torch.tensor(miss, dtype=torch.float64))
    unit = weight[favourite] / weight[favourite].square().sum(1, keepdim=True)
    rest = (hidden @ weight.T).scatter(1, favourite[:, None], -torch.inf).logsumexp(1)
    own = (hidden * weight[favourite]).sum(1)
    inputs.hidden_states.copy_(hidden + (rest + lift - own)[:, None] * unit)
    ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    if frozen:
        freeze_head(ours)
    scores = ours.call(linear_logprob_stats, backend="cpu", workspace_bytes=1 << 14)
    log_probs = dense_log_probs(dense)
    if scored == "label":
        actual, index = scores.token_logps, inputs.labels
    else:
        actual = scores.top_non_label_logps
        index = log_probs.detach().scatter(1, inputs.labels[:, None], -torch.inf).argmax(1)
    actual.sum().backward()
    log_probs.gather(1, index[:, None]).sum().backward()
    error = (ours.hidden_states.grad.double() - dense.hidden_states.grad).norm(dim=1)
    assert (error <= 0.005 * dense.hidden_states.grad.norm(dim=1)).all()


OBJECTIVES = {
    "rdpo": None,
    "symmetric": Objective.symmetric(),
    "mdpo": Objective.mdpo(anchor_offset=0.3),
    "mixed": Objective(
        (
            Term((1, -1), link="ipo"),
            Term((1, 0, -1), link="hinge", weight=0.5),
            Term((1, -1), label_smoothing=0.1, beta=0.3),
        ),
        nll_weight=0.3,
    ),
}


def pair_batch(num_cells, num_pairs=5, num_positions=9, hidden_size=12, vocabulary=40):
    generator = seeded(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_sequences = num_cells * num_pairs
    labels = torch.randint(vocabulary, (num_sequences, num_positions), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    labels[-1] = -100  # an absent cell
    labels[:num_pairs, 0] = 3
    tensors = (
        normal(num_sequences, num_positions, hidden_size),
        normal(vocabulary, hidden_size),
        normal(vocabulary),
        normal(3, hidden_size),
        normal(vocabulary, 3),
    )
    return tensors, labels, normal(num_cells, num_pairs)


def through_both_outputs(output, leaves):
    """Differentiate loss and logps together, with a slope that is not 1."""
    slopes = torch.linspace(-1, 1, output.logps.numel(), dtype=torch.float64).view_as(output.logps)
    (1.7 * output.loss + (slopes * output.logps).sum()).backward()
    return [part.detach() for part in output], [leaf.grad for leaf in leaves]


def loss_and_gradients(tensors, labels, ref_logps, **options):
    hidden, weight, bias, lora_a, lora_b = leaves = [t.clone().requires_grad_() for t in tensors]
    options = {"workspace_bytes": WORKSPACE_BYTES} | options
    output = rdpo_loss(
        hidden, weight, labels, ref_logps, lm_head_bias=bias, lm_head_lora=(lora_a, lora_b, 0.5),
        **options,
    )  # fmt: skip
    return through_both_outputs(output, leaves)


def dense_loss_and_gradients(tensors, labels, ref_logps, objective=None, **options):
    hidden, weight, bias, lora_a, lora_b = leaves = [t.clone().requires_grad_() for t in tensors]
    head = {"lm_head_bias": bias, "lm_head_lora": (lora_a, lora_b, 0.5)}
    inputs = HeadInputs(hidden, weight, labels, head)
    output = dense_rdpo_loss(inputs, ref_logps, objective or Objective.rdpo(), **options)
    return through_both_outputs(output, leaves)


@pytest.mark.parametrize("rows_per_tile", [11, 4096])
@pytest.mark.parametrize("memory", ["stash", "recompute", "tile"])
@pytest.mark.parametrize("scoring", ["label", "top_non_label"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_rdpo_loss_equals_the_dense_loss(
    backend, objective, scoring, memory, rows_per_tile, monkeypatch
):
    """K31."""
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", rows_per_tile)
    tensors, labels, ref_logps = pair_batch(num_cells=4 if objective == "symmetric" else 3)
    options = {"objective": OBJECTIVES[objective], "rejected_scoring": scoring}
    expected = dense_loss_and_gradients(tensors, labels, ref_logps, **options)
    actual = loss_and_gradients(
        tensors, labels, ref_logps, backend=backend, memory=memory, **options
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", ["stash", "tile"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_packed_batches_in_any_order_equal_the_dense_loss(backend, memory, monkeypatch):
    monkeypatch.setattr("realign_kernels.ops.pair_tiles._ROWS_PER_TILE", 13)
    tensors, labels, ref_logps = pair_batch(num_cells=3)
    expected, grads = dense_loss_and_gradients(tensors, labels, ref_logps)
    order = torch.randperm(labels.numel(), generator=seeded(1))
    ids = torch.arange(15)[:, None].expand(labels.shape).reshape(-1)[order]
    lengths = (labels != -100).sum(1).view(3, 5)
    packed = (tensors[0].reshape(-1, 12)[order], *tensors[1:])
    actual, packed_grads = loss_and_gradients(
        packed, labels.reshape(-1)[order], ref_logps, backend=backend, memory=memory,
        sequence_ids=ids, sequence_lengths=lengths,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    hidden_grad = torch.empty_like(packed_grads[0])
    hidden_grad[order] = packed_grads[0]
    torch.testing.assert_close(hidden_grad, grads[0].reshape(-1, 12), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed_grads[1:], grads[1:], rtol=1e-10, atol=1e-12)


def test_auto_uses_tiles_where_the_stash_is_too_small(monkeypatch):
    used = []
    monkeypatch.setattr(
        # Not by its dotted name, which is that of the function as well.
        sys.modules["realign_kernels.rdpo_loss"],
        "rdpo_tiles_op",
        lambda *args: used.append(1) or rdpo_tiles_op(*args),
    )
    tensors, labels, ref_logps = pair_batch(num_cells=3)
    expected = loss_and_gradients(tensors, labels, ref_logps, backend="cpu")
    assert not used
    actual = loss_and_gradients(tensors, labels, ref_logps, backend="cpu", stash_bytes=1000)
    assert used
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_logits_beyond_the_stash_are_recomputed():
    inputs = make_head_inputs(37, 101, 24)
    grads = []
    for stash_bytes in (1 << 20, 1000):
        leaves = inputs.as_leaves()
        leaves.call(linear_logprob, backend="cpu", stash_bytes=stash_bytes).sum().backward()
        grads.append([tensor.grad for tensor in leaves.tensors])
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("link", ["logsigmoid", "hinge", "ipo"])
def test_a_nan_pair_gives_a_nan_loss(link, backend):
    tensors, labels, ref_logps = pair_batch(num_cells=3)
    tensors[0][0, 0] = torch.nan
    objective = Objective((Term((1, -1), link=link),))
    loss = rdpo_loss(*tensors[:2], labels, ref_logps, objective=objective, backend=backend).loss
    assert loss.isnan()


ALL_MODES = ["stash", "recompute", "tile"]


def half_batch(dtype, trains_hidden=True):
    tensors, labels, ref_logps = pair_batch(num_cells=3)
    hidden, weight = (tensor.to(dtype).clone() for tensor in tensors[:2])
    return hidden.requires_grad_(trains_hidden), weight.requires_grad_(), labels, ref_logps


@pytest.mark.parametrize("memory", ALL_MODES)
def test_checkpointing_around_the_loss_gives_equal_gradients(memory):
    """Saved tensors may be unpacked once only."""
    hidden, weight, labels, ref_logps = half_batch(torch.float64)

    def loss(hidden, weight):
        return rdpo_loss(hidden, weight, labels, ref_logps, memory=memory, backend="cpu").loss

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpointed = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed, (hidden, weight)), expected)


@pytest.mark.parametrize("memory", ALL_MODES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 65536.0), (torch.bfloat16, 1 / 3)])
def test_the_upstream_gradient_is_not_rounded(dtype, scale, memory):
    """A gradient scaler's factor overflows float16; a third is not a number of bfloat16."""
    hidden, weight, labels, ref_logps = half_batch(dtype)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    objective = Objective.rdpo(beta=1e-3)
    oracle = dense_rdpo_loss(HeadInputs(*exact, labels, {}), ref_logps, objective).loss
    loss = rdpo_loss(
        hidden, weight, labels, ref_logps, beta=1e-3, memory=memory, backend="cpu"
    ).loss
    grads = torch.autograd.grad(loss * scale, (hidden, weight))
    for grad, expected in zip(grads, torch.autograd.grad(oracle * scale, exact), strict=True):
        error = (grad.double() - expected).norm() / expected.norm()
        assert error <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("memory", ALL_MODES)
def test_gradients_through_loss_and_logps_are_rounded_once(memory):
    """The two nearly cancel, so that rounding each of them would show in their sum."""
    hidden, weight, labels, ref_logps = half_batch(torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    oracle = dense_rdpo_loss(HeadInputs(*exact, labels, {}), ref_logps, Objective.rdpo())
    output = rdpo_loss(hidden, weight, labels, ref_logps, memory=memory, backend="cpu")
    upstream = torch.tensor([[0.09], [-0.045], [-0.045]], dtype=torch.float64) / 5  # of 5 pairs
    grads, expected = (
        torch.autograd.grad(part.loss + (upstream * part.logps).sum(), inputs)
        for part, inputs in ((output, (hidden, weight)), (oracle, exact))
    )
    for grad, exact_grad in zip(grads, expected, strict=True):
        rounding = (exact_grad.bfloat16().double() - exact_grad).norm()
        assert (grad.double() - exact_grad).norm() <= 1.2 * rounding


@pytest.mark.parametrize("memory", ["auto", "stash", "tile"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_batch_of_ignored_tokens_without_pairs_gives_zero_gradients(frozen, memory):
    """Such a batch occurs on a rank whose share is empty."""
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=not frozen)
    loss = rdpo_loss(
        hidden, weight, torch.full((4,), -100), torch.zeros(3, 0), memory=memory,
        sequence_ids=torch.zeros(4, dtype=torch.int64), backend="cpu",
    ).loss  # fmt: skip
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_wrong_lengths_are_refused_before_tiles_are_cut():
    hidden, weight, labels, ref_logps = half_batch(torch.float64)
    lengths = (labels != -100).sum(1).view(3, 5)
    lengths[0, 0] = 5000
    with pytest.raises(ValueError, match=r"got 5000 for cell 0 of pair 0, which has \d"):
        rdpo_loss(
            hidden, weight, labels, ref_logps, sequence_lengths=lengths, memory="tile",
            backend="cpu",
        )  # fmt: skip


def test_bad_ids_access_no_memory_without_checks(monkeypatch):
    monkeypatch.setenv("REALIGN_CHECK", "0")
    hidden, weight, labels, ref_logps = half_batch(torch.float64)
    ids = torch.arange(15)[:, None].expand(labels.shape).reshape(-1).clone()
    ids[10:14] = torch.tensor([-1, 15, 1 << 40, -(1 << 40)])
    output = rdpo_loss(
        hidden.reshape(-1, 12), weight, labels.reshape(-1), ref_logps, sequence_ids=ids,
        backend="cpu",
    )  # fmt: skip
    assert output.logps.isfinite().all()


@pytest.mark.parametrize("scoring", ["label", "top_non_label"])
def test_a_label_out_of_range_gives_nan_without_checks(scoring, monkeypatch):
    monkeypatch.setenv("REALIGN_CHECK", "0")
    hidden, weight, labels, ref_logps = half_batch(torch.float64)
    labels[6, 0] = 45  # of 40 tokens, in cell 1 of pair 1
    for memory in ("recompute", "stash", "tile"):
        output = rdpo_loss(
            hidden, weight, labels, ref_logps, rejected_scoring=scoring, memory=memory,
            backend="cpu",
        )  # fmt: skip
        assert output.logps[1, 1].isnan()
        (grad,) = torch.autograd.grad(output.loss, hidden)
        assert grad[6, 0].isnan().all()


def test_saved_tensors_may_be_returned_with_other_strides():
    """Offloading hooks return the values, but not always the strides."""
    inputs = make_head_inputs(9, 23, 4)
    results = []
    for is_moved in (False, True):
        leaves = inputs.as_leaves()

        def pack(tensor, is_moved=is_moved):
            return tensor.mT.contiguous().mT if is_moved and tensor.ndim == 2 else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = leaves.call(linear_logprob, backend="cpu", memory="recompute")
        scores.sum().backward()
        results.append([tensor.grad for tensor in leaves.tensors])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_a_requested_stash_that_does_not_fit_is_refused():
    leaves = make_head_inputs(37, 101, 24).as_leaves()
    with pytest.raises(ValueError, match=r"stash_bytes must be >= 29896 .*got 1000\. Raise it"):
        leaves.call(linear_logprob, backend="cpu", memory="stash", stash_bytes=1000)


def test_a_pair_larger_than_the_stash_is_recomputed():
    tensors, labels, ref_logps = pair_batch(num_cells=3)
    expected = dense_loss_and_gradients(tensors, labels, ref_logps)
    actual = loss_and_gradients(
        tensors, labels, ref_logps, backend="cpu", memory="tile", stash_bytes=1000
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
