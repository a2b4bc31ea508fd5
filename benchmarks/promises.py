"""The accuracy that the library promises, as assertions that all checks on a GPU share.

|logp - float64| is at most 1e-5 for float32 and 1e-4 for half inputs, plus 1e-6 of the larger of
|logp| and the label's logit; the error of a gradient is at most 1.2 times that of plain PyTorch in
the same dtype, or the rounding of the result.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from realign_kernels.testing import HeadInputs, dense_logits, dense_logprob

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOGP_BOUND = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-4}
GRAD_FLOOR = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 3e-3}
_GRAD_NAMES = ("hidden_states", "lm_head_weight", "bias or A", "A or B", "B")


@dataclass(frozen=True)
class Outcome:
    """The result of one check; ``problem`` is empty if it passed."""

    name: str
    problem: str = ""


def outcome(name: str, check: Callable[..., None], *arguments: Any) -> Outcome:
    """Run a check and return its outcome."""
    try:
        check(*arguments)
    except AssertionError as error:
        return Outcome(name, str(error))
    except Exception:  # a kernel that does not compile or launch is an outcome too
        return Outcome(name, traceback.format_exc(limit=-3).strip())
    return Outcome(name)


def assert_logps(actual: Tensor, inputs: HeadInputs, dtype: str) -> None:
    """Compare log-probabilities with float64 from the same inputs."""
    exact = in_float64(inputs)
    with torch.no_grad():
        expected = dense_logprob(exact)
        labels = inputs.labels.clamp(min=0)[..., None]
        label_logits = dense_logits(exact).gather(-1, labels).squeeze(-1)
    relative = 1e-6 * torch.maximum(expected.abs(), label_logits.abs())
    assert_close("token_logps", actual, expected, LOGP_BOUND[dtype], relative)


def assert_close(
    name: str, actual: Tensor, expected: Tensor, bound: float, extra: Tensor | float = 0.0
) -> None:
    """Compare element by element; the message names the worst element."""
    difference = (actual.detach().double() - expected.detach()).abs()
    allowed = bound + 1e-6 * expected.detach().abs() + extra
    excess = torch.where(difference <= allowed, 0.0, difference / allowed)
    excess = torch.where(difference.isnan(), torch.inf, excess)
    worst = int(excess.argmax())
    assert not bool((excess > 0).any()), (
        f"{name}: {int((excess > 0).sum())} of {excess.numel()} beyond the bound, the worst at "
        f"{worst}: {actual.flatten()[worst].item()} for {expected.flatten()[worst].item()}"
    )


def assert_gradients(
    leaves: HeadInputs, exact: HeadInputs, plain: HeadInputs, dtype: str, memory: str
) -> None:
    """Compare the gradients in ``leaves`` with float64, relative to the error of plain PyTorch."""
    triples = zip(leaves.tensors, exact.tensors, plain.tensors, strict=True)
    for name, (actual, expected, eager) in zip(_GRAD_NAMES, triples, strict=False):
        if not actual.requires_grad:
            assert actual.grad is None, f"{name}: a frozen input has a gradient"
            continue
        assert actual.grad is not None, f"{name}: no gradient"
        error, base = (
            relative_error(actual.grad, expected.grad),
            relative_error(eager.grad, expected.grad),
        )
        bound = max(1.2 * base, GRAD_FLOOR[dtype])
        assert error <= bound, (
            f"gradient of {name}, memory={memory}: relative error {error:.2e}, allowed {bound:.2e} "
            f"(plain PyTorch {base:.2e})"
        )


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Return the error of a tensor in the Frobenius norm, relative to the expected tensor."""
    assert actual is not None
    assert expected is not None
    return ((actual.double() - expected).norm() / expected.norm()).item()


def in_float64(inputs: HeadInputs) -> HeadInputs:
    """Return the same call on leaves of float64."""
    return inputs.as_leaves(torch.float64)
