"""The patch of TRL's log-probability function: what it computes, and what it passes on."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from realign.integrations.trl import patch_trl
from realign_kernels.testing import (
    HeadInputs,
    dense_log_probs,
    dense_logits,
    make_head_inputs,
    peak_bytes,
)
from tests.realign.integrations.trl.head_calls import call, patched

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 0.3},
    "softcapped": {"logit_softcap": 4.0, "bias": True},
    "everything": {"logit_scale": 0.5, "logit_softcap": 5.0, "temperature": 0.7, "bias": True},
}


def dense(inputs: HeadInputs) -> list[Tensor]:
    """The definitions, in TRL's order."""
    log_probs, logits = dense_log_probs(inputs), dense_logits(inputs)
    return [
        log_probs.gather(-1, inputs.labels[:, None]).squeeze(-1),
        -(log_probs.exp() * log_probs).sum(-1),
        (2 * log_probs).logsumexp(-1),
        logits.mean(-1),
        log_probs.argmax(-1) == inputs.labels,
    ]


def total(results: Any, slopes: tuple[float, float]) -> Tensor:
    """One number of log-probabilities and entropies, with another slope for every row."""
    rows = torch.linspace(-1, 2, len(results[0])).double()
    terms = [
        slope * (rows * part.double()).sum()
        for part, slope in zip(results, slopes, strict=False)
        if slope
    ]
    return torch.stack(terms).sum()


def relative(found: Tensor, exact: Tensor) -> float:
    """Error of a gradient."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "most", "most_of_gradient"),
    [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 1e-4, 2.5e-3), (torch.float64, 1e-5, 1e-6)],
    ids=["float32", "bfloat16", "float64"],
)
def test_results_and_gradients_are_those_of_float64(dtype, most, most_of_gradient, case, frozen):
    inputs = make_head_inputs(41, 203, 16, dtype, **CASES[case])
    ours, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    for tensor in ours.tensors[1:] if frozen else ():
        tensor.requires_grad_(False)
    results, expected = patched(ours), dense(exact)
    for found, value in zip(results[:4], expected[:4], strict=True):
        assert found.dtype == torch.float32  # TRL's own results are
        assert (found - value).abs().max() <= most
    assert torch.equal(results[4], expected[4])
    assert [part.requires_grad for part in results] == [True, True, False, False, False]
    total(results, (1.0, 0.5)).backward()
    total(expected, (1.0, 0.5)).backward()
    for tensor, oracle in zip(ours.tensors, exact.tensors, strict=True):
        if tensor.requires_grad:
            assert tensor.grad.dtype == dtype
            assert relative(tensor.grad, oracle.grad) <= most_of_gradient


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (0.0, 1.0), (2.0, -0.5)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_trls_function(case, slopes):
    """Compare the gradients of the log-probabilities alone, of the entropies alone, and of both."""
    inputs = make_head_inputs(41, 203, 16, torch.float32, **CASES[case])
    ours, theirs, exact = inputs.as_leaves(), inputs.as_leaves(), inputs.as_leaves(torch.float64)
    total(patched(ours), slopes).backward()
    total(call(ChunkedLogProbFunction, theirs), slopes).backward()
    total(dense(exact), slopes).backward()
    for tensor, stock, oracle in zip(ours.tensors, theirs.tensors, exact.tensors, strict=True):
        assert relative(tensor.grad, stock.grad) <= 3e-6
        assert relative(tensor.grad, oracle.grad) <= 3e-6


ASKED = [names for count in range(5) for names in combinations(STATISTICS, count)]


@pytest.mark.parametrize("names", ASKED, ids=lambda names: "+".join(names) or "nothing")
def test_only_requested_outputs_are_returned(names):
    inputs = make_head_inputs(17, 61, 8, torch.float32, bias=True)
    ours = patched(inputs, ("log_probs", *names))
    for found, expected in zip(
        ours, call(ChunkedLogProbFunction, inputs, ("log_probs", *names)), strict=True
    ):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patched(inputs, names)[0], ours[0])  # TRL always returns these


def test_mixed_dtypes_and_autocast_are_accurate():
    mixed = make_head_inputs(41, 203, 16, torch.bfloat16)
    exact = dense(mixed.as_leaves(torch.float64))[0]
    wide = mixed.lm_head_weight.float()
    cases = [(mixed.hidden_states, wide), (mixed.hidden_states.float(), mixed.lm_head_weight)]
    for hidden, weight in cases:
        found = patched(mixed.replace_tensors((hidden, weight)))[0]
        assert (found - exact).abs().max() <= 1e-5
    # What is beyond the digits of bfloat16 is rounded away by autocast.
    within = mixed.replace_tensors((mixed.hidden_states.float(), wide * (1 + 2**-12))).as_leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = patched(within)
    total(results, (1.0, 0.5)).backward()
    assert (results[0] - exact).abs().max() <= 1e-5
    oracle = mixed.as_leaves(torch.float64)
    total(dense(oracle), (1.0, 0.5)).backward()
    for tensor, expected in zip(within.tensors, oracle.tensors, strict=True):
        assert relative(tensor.grad, expected.grad) <= 2.5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_another_dtype_is_rounded_as_trl_rounds_it(dtype):
    inputs = make_head_inputs(17, 61, 8, torch.float32, bias=True)
    bias = inputs.options["lm_head_bias"].to(dtype).requires_grad_()
    inputs.options["lm_head_bias"] = bias
    results, expected = patched(inputs), call(ChunkedLogProbFunction, inputs)
    torch.testing.assert_close(results[0], expected[0], atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(results[0].sum(), bias)
    (stock,) = torch.autograd.grad(expected[0].sum(), bias)
    torch.testing.assert_close(grad, stock)


def test_a_batch_without_labels_gives_zero_gradients():
    """A micro-batch may have no answer token: its gradient is zero, and not missing."""
    inputs = make_head_inputs(5, 61, 8, torch.float32).as_leaves()
    no_rows = HeadInputs(
        inputs.hidden_states[:0], inputs.lm_head_weight, inputs.labels[:0], inputs.options
    )
    results = patched(no_rows)
    assert all(part.shape == (0,) for part in results)
    (results[0].sum() + results[1].sum()).backward()
    assert not inputs.hidden_states.grad.any()
    assert not inputs.lm_head_weight.grad.any()


def test_int32_targets_and_inference_mode_are_accepted():
    inputs = make_head_inputs(17, 61, 8, torch.float32)
    short = HeadInputs(*inputs.tensors, inputs.labels.int(), {})
    torch.testing.assert_close(patched(short)[0], patched(inputs)[0])
    with torch.inference_mode():
        results = patched(inputs)
    assert not results[0].requires_grad


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_patch_takes_less_memory_than_trls_function(frozen):
    """The size is that of TRL's chunks: a batch that fits without the patch fits with it."""
    inputs = make_head_inputs(512, 8_000, 32, torch.float32).as_leaves()
    inputs.lm_head_weight.requires_grad_(not frozen)
    leaves = [tensor for tensor in inputs.tensors if tensor.requires_grad]

    def differentiate(function: Any) -> Any:
        results = call(function, inputs, chunk_size=utils._CHUNKED_LOGPROB_CHUNK_SIZE)
        return torch.autograd.grad(results[0].sum(), leaves)

    stock = peak_bytes(lambda: differentiate(ChunkedLogProbFunction))
    with patch_trl():
        assert peak_bytes(lambda: differentiate(utils._ChunkedLogProbFunction)) < stock


def test_a_trained_head_saves_no_tensor_of_logits_size():
    inputs = make_head_inputs(512, 8_000, 32, torch.float32).as_leaves()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patched(inputs)
    assert max(kept) < 512 * 8_000


def other_class(tensor: Tensor) -> Tensor:
    """A tensor of a class that may define products of its own, as quantized weights have."""

    class Special(Tensor):
        pass

    return tensor.as_subclass(Special)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"logit_scale": 0.0}, None),
        ({"logit_scale": -0.5}, None),
        ({"logit_softcap": 0.0}, None),
        ({"logit_softcap": -3.0}, None),
        ({"temperature": -0.5}, None),
        ({"logit_scale": float("inf")}, None),
        ({}, lambda hidden, weight, labels: (hidden, weight.double(), labels)),
        ({}, lambda hidden, weight, labels: (hidden.double(), weight, labels)),
        ({}, lambda hidden, weight, labels: (hidden, weight.to(torch.float8_e4m3fn), labels)),
        ({}, lambda hidden, weight, labels: (hidden, other_class(weight), labels)),
        ({}, lambda hidden, weight, labels: (hidden, weight, labels.clone().fill_(61))),
        ({}, lambda hidden, weight, labels: (hidden, weight, labels - 30)),
    ],
    ids=[
        "scale-0", "scale-negative", "softcap-0", "softcap-negative", "temperature-negative",
        "scale-infinite", "double-weight", "double-hidden", "float8", "subclass", "label-beyond",
        "label-negative",
    ],
)  # fmt: skip
def test_unsupported_inputs_are_passed_on_to_trls_function(options, change):
    """Each input gives the same numbers with the patch as without it."""
    inputs = make_head_inputs(17, 61, 8, torch.float32, **options)
    if change is not None:
        hidden, weight, labels = change(*inputs.tensors, inputs.labels)
        inputs = HeadInputs(hidden, weight, labels, inputs.options)
    expected = call(ChunkedLogProbFunction, inputs)
    with patch_trl() as patch:
        results = call(utils._ChunkedLogProbFunction, inputs)
    assert (patch.calls, patch.passed_on) == (0, 1)
    for found, value in zip(results, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)


def test_unsupported_devices_are_passed_on_to_trls_function():
    """TRL's function fails on the meta device, with and without the patch."""
    inputs = make_head_inputs(17, 61, 8, torch.float32)
    inputs = HeadInputs(*(part.to("meta") for part in (*inputs.tensors, inputs.labels)), {})
    with pytest.raises(RuntimeError, match="unknown device type for autocast"):
        call(ChunkedLogProbFunction, inputs)
    with patch_trl() as patch, pytest.raises(RuntimeError, match="unknown device type"):
        call(utils._ChunkedLogProbFunction, inputs)
    assert patch.passed_on == 1


class Partitioned:
    """ZeRO-3 as a head sees it: its weights are empty outside of TRL's context.

    Stands in for DeepSpeed, which needs a GPU.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.whole = {id(part): part.data.clone() for part in head.parameters()}
        for number, part in enumerate(head.parameters()):
            part.ds_id = number
            part.data = part.data.new_empty(0)
        self.entered = 0

    def __call__(self, *parts: Any) -> Partitioned:
        """Stand in for TRL's ``maybe_gather_lm_head_ctx``."""
        self.parts = [part for part in parts if part is not None]
        return self

    def __enter__(self) -> None:
        self.entered += 1
        for part in self.parts:
            part.data = self.whole[id(part)]

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.data = part.data.new_empty(0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("slopes", [(1.0, 0.0), (1.0, 0.5)], ids=["log-probs", "and-entropy"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_of_zero3_is_gathered_again_for_the_backward(monkeypatch, autocast, slopes, frozen):
    inputs = make_head_inputs(17, 61, 8, torch.float32, bias=True)
    gradients = []
    for is_partitioned in (True, False):
        head = nn.Linear(8, 61)
        head.weight.data.copy_(inputs.lm_head_weight)
        head.bias.data.copy_(inputs.options["lm_head_bias"])
        head.requires_grad_(not frozen)
        hidden = inputs.hidden_states.clone().requires_grad_()
        gather: Any = Partitioned(head) if is_partitioned else Partitioned(nn.Linear(1, 1))
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
        parts = (head.weight, head.bias) if is_partitioned else ()
        with patch_trl() as patch:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), gather(*parts):
                results = utils._ChunkedLogProbFunction.apply(
                    hidden, head.weight, head.bias, inputs.labels, 0.7, 32
                )
            leaves = [part for part in (hidden, head.weight, head.bias) if part.requires_grad]
            gradients.append(torch.autograd.grad(total(results, slopes), leaves))
        assert (patch.calls, patch.passed_on) == (1, 0)
        assert gather.entered == (2 if is_partitioned else 1)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
