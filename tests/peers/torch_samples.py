"""torch's own samples of its operator against our entry of the same signature.

Samples come from the tables that torch tests its operators with.  Each is one that our entry takes,
and then the result is compared with torch's operator in float64 on the same numbers; or one that it
must refuse.
"""

from __future__ import annotations

import random
import sys
import unittest
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from realign_kernels.compat.torch import linear_cross_entropy

if "expecttest" not in sys.modules:  # imported by the tables, and used by nothing here
    sys.modules["expecttest"] = ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_methods_invocations import op_db

OPERATORS = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_taken(sample):
    """Return whether our entry takes a sample: indices of classes, and one output a class."""
    weight, target = sample.args
    return weight.ndim == 2 and not target.is_floating_point()


def draw():
    """Return samples by name, those that are taken and those that are refused."""
    taken, refused = {}, {}
    random.seed(0)
    torch.manual_seed(0)
    for op in OPERATORS:
        for dtype in DTYPES:
            samples = op.sample_inputs("cpu", dtype, requires_grad=True)
            for number, sample in enumerate(samples):
                name = f"{op.variant_test_name or 'plain'}-{str(dtype)[6:]}-{number}"
                (taken if is_taken(sample) else refused)[name] = sample
    return taken, refused


TAKEN, REFUSED = draw()


def run(function, sample, dtype=None):
    """Return the loss and the gradients of its inputs, at a dtype where one is given."""

    def given(tensor):
        leaf = tensor.detach().clone().to(dtype or tensor.dtype)
        return leaf.requires_grad_(tensor.requires_grad)

    weight, target = sample.args
    options = {
        name: given(value) if isinstance(value, torch.Tensor) else value
        for name, value in sample.kwargs.items()
        if dtype is None or name != "options"
    }
    inputs = [given(sample.input), given(weight)]
    loss = function(*inputs, target, **options)
    if "linear_bias" in options:
        inputs.append(options["linear_bias"])
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    grads = torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))
    return [loss.detach(), *(grad.detach() for grad in grads)]


@pytest.mark.filterwarnings("ignore")  # of the chunked operator
@pytest.mark.parametrize("sample", TAKEN.values(), ids=TAKEN)
def test_accepted_sample_is_as_accurate_as_torch(sample):
    """The error is at most that of torch's own result, or one rounding to its dtype."""
    exact = run(F.linear_cross_entropy, sample, torch.float64)
    own = run(F.linear_cross_entropy, sample)
    ours = run(linear_cross_entropy, sample)
    for result, stock, oracle in zip(ours, own, exact, strict=True):
        assert result.dtype == stock.dtype
        assert result.shape == stock.shape
        rounding = torch.finfo(result.dtype).eps * max(oracle.norm().item(), 1.0)
        bound = max((stock.double() - oracle).norm().item(), 2 * rounding)
        assert (result.double() - oracle).norm() <= bound


@pytest.mark.parametrize("sample", REFUSED.values(), ids=REFUSED)
def test_unsupported_sample_is_refused(sample):
    """A sample with several outputs per class, or with class probabilities, is not supported."""
    message = r"(linear_weight must have shape \(V, D\)|target must hold class indices), got .*Call"
    with pytest.raises(NotImplementedError, match=message):
        linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


def test_inputs_refused_by_torch_are_refused():
    """Three-dimensional input is the exception, which is accepted here."""
    for sample in OPERATORS[0].error_inputs("cpu"):
        given = sample.sample_input
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=r"must .*, got "):
            linear_cross_entropy(given.input, *given.args, **given.kwargs)
