"""Every public name has an example in its docstring, and every example gives what it shows."""

from __future__ import annotations

import pytest

import realign_kernels
from realign_kernels.compat import cce, liger, verl
from realign_kernels.compat import torch as of_torch
from tests.docstring_examples import check_example, name_of

COMPAT = [
    cce.linear_cross_entropy,
    cce.LinearCrossEntropy,
    liger.LigerFusedLinearDPOLoss,
    liger.liger_fused_linear_dpo,
    liger.LigerFusedLinearScaledCrossEntropyFunction,
    of_torch.linear_cross_entropy,
    verl.linear_cross_entropy,
    verl.FusedLinearForPPO,
]
EXPORTED = [getattr(realign_kernels, name) for name in realign_kernels.__all__]
# named tuples are what functions return: these have the examples
PUBLIC = [
    *(one for one in EXPORTED if callable(one) and not hasattr(one, "_fields")),
    *(getattr(realign_kernels.Objective, name) for name in ("dpo", "rdpo", "mdpo", "symmetric")),
    *COMPAT,
]


@pytest.mark.parametrize("public", PUBLIC, ids=name_of)
def test_the_docstring_example_of_a_public_name_runs(public: object) -> None:
    check_example(public)
