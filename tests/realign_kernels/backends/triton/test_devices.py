"""Kernels launch on the device of their tensors, even where another one is current."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from triton.runtime import interpreter, jit

from realign_kernels import linear_logprob_stats, rdpo_loss
from realign_kernels.backends.dispatch import on_device_of
from realign_kernels.ops import pair_loss, score_tokens
from realign_kernels.testing import make_head_inputs

LAUNCH = (interpreter.GridExecutor, "__call__")
if os.environ.get("TRITON_INTERPRET") != "1":
    LAUNCH = (jit.JITFunction, "run")


@pytest.fixture
def launches(monkeypatch):
    """Of every launch, whether the device of its tensors had been made the current one."""
    seen, inside = [], []

    @contextmanager
    def guard(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    original = getattr(*LAUNCH)

    def launch(self, *args, **options):
        seen.append(len(inside) > 0)
        return original(self, *args, **options)

    for module in (score_tokens, pair_loss):
        monkeypatch.setattr(module, "on_device_of", guard)
    monkeypatch.setattr(*LAUNCH, launch)
    return seen


@pytest.mark.parametrize("memory", ["frozen", "stash", "tile"])
@pytest.mark.usefixtures("few_rows")
def test_every_launch_is_on_the_device_of_its_tensors(memory, launches):
    inputs = make_head_inputs(6, 7, 3, torch.float32).as_leaves()
    hidden, weight = inputs.tensors
    weight.requires_grad_(memory != "frozen")
    options = {"backend": "triton", "memory": "auto" if memory == "frozen" else memory}
    ref_logps = torch.zeros(3, 2)
    output = rdpo_loss(hidden[:, None], weight, inputs.labels[:, None], ref_logps, **options)
    (output.loss + output.logps.sum()).backward()
    packed = rdpo_loss(
        hidden, weight, inputs.labels, ref_logps, sequence_ids=torch.arange(6),
        statistics=True, **options,
    )  # fmt: skip
    packed.loss.backward()
    if memory != "tile":
        stats = inputs.call(linear_logprob_stats, **options)
        (stats.token_logps + stats.entropy).sum().backward()
    assert len(launches) > 10
    assert all(launches)


def test_the_device_of_a_tensor_becomes_the_current_one():
    with FakeTensorMode():
        context = on_device_of(torch.empty(1, device="cuda:1"))
    assert isinstance(context, torch.cuda.device_of)
    assert context.idx == 1
