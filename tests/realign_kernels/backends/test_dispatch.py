"""A kernel set has its own tile, dtype and product; no other code depends on its name."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import dispatch
from realign_kernels.backends import torch as plain
from realign_kernels.backends.dispatch import Backend
from realign_kernels.testing import dense_logprob, make_head_inputs
from realign_kernels.tiling import TileShape

KERNELS = (
    "TEMPORARIES", "expect_writes", "epilogue", "label_dot", "combine", "add_entries", "pair_loss",
)  # fmt: skip


@pytest.fixture
def recording(monkeypatch):
    """The plain kernels with bfloat16 operands and tiles of 3 by 5, which note their products."""
    kernels = types.ModuleType("recording_kernels")
    kernels.products = []

    def product(out, a, b, *, adds):
        kernels.products.append((tuple(out.shape), a.dtype, out.dtype))
        plain.product(out, a.to(out.dtype), b.to(out.dtype), adds=adds)

    vars(kernels).update({name: getattr(plain, name) for name in KERNELS})
    kernels.LARGEST_TILE = TileShape(3, 5)
    kernels.operand_dtype = lambda computed, rounded, *, is_given: torch.bfloat16
    kernels.exponential_dtype = lambda computed, operand: operand
    kernels.product = product
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    row = Backend(kernels.__name__, ("cpu",), "notes its products")
    monkeypatch.setitem(dispatch.BACKENDS, "recording", row)
    return kernels


def test_a_new_backend_needs_a_module_and_a_table_row(recording):
    inputs = make_head_inputs(7, 13, 4, torch.float32)
    inputs = inputs.replace_tensors([part.bfloat16().float() for part in inputs.tensors])
    actual = inputs.call(linear_logprob, backend="recording")
    torch.testing.assert_close(actual, dense_logprob(inputs), rtol=1e-5, atol=1e-5)
    shapes = {shape for shape, *_ in recording.products}
    assert shapes == {(3, 5), (3, 3)}  # 7 rows, filled up to whole tiles, by 13 columns
    assert all(a == torch.bfloat16 and out == torch.float32 for _, a, out in recording.products)


@pytest.mark.parametrize("memory", ["auto", "stash", "recompute", "tile"])
@pytest.mark.parametrize("trains_head", [False, True])
def test_the_loss_runs_through_a_new_backend(recording, memory, trains_head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 4, generator=generator).bfloat16().float()
    weight = torch.randn(13, 4, generator=generator).bfloat16().float()
    labels = torch.randint(13, (12,), generator=generator)
    results = []
    for backend in ("recording", "eager"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains_head)
        loss = rdpo_loss(
            *leaves, labels, torch.zeros(3, 2), sequence_ids=torch.arange(12) % 6,
            memory=memory, backend=backend,
        ).loss  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3)
    assert any(a == torch.bfloat16 for _, a, _ in recording.products)
    assert all(shape[0] <= 3 or shape[1] == 4 for shape, *_ in recording.products)


@pytest.fixture
def rocm_without_wide_products(monkeypatch):
    """A build of torch for ROCm whose device, here the CPU, has no product of two dtypes."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    row = dispatch.BACKENDS["triton"]._replace(device_types=("cpu",))
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "triton": row})
    monkeypatch.setattr(dispatch, "_REASONS", {})


@pytest.mark.usefixtures("rocm_without_wide_products")
def test_auto_skips_kernels_whose_products_torch_lacks():
    assert dispatch.auto_backend("cpu") == "cpu"
    dispatch.BACKENDS.pop("cpu")
    assert dispatch.auto_backend("cpu") == "eager"


@pytest.mark.usefixtures("rocm_without_wide_products")
def test_the_probe_runs_outside_of_a_compiled_graph():
    dispatch.BACKENDS.pop("cpu")
    inputs = make_head_inputs(5, 11, 4, torch.float32)
    compiled = torch.compile(
        lambda *tensors: linear_logprob(*tensors), fullgraph=True, backend="aot_eager"
    )
    actual = compiled(inputs.hidden_states, inputs.lm_head_weight, inputs.labels)
    torch.testing.assert_close(actual, dense_logprob(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("rocm_without_wide_products")
def test_a_backend_whose_products_torch_lacks_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"requires torch\.mm .* lacks on 'cpu'"):
        dispatch.resolve_backend("triton", "cpu")


def test_cuda_builds_are_not_probed(monkeypatch):
    monkeypatch.setattr(dispatch, "_REASONS", {})
    monkeypatch.setattr(torch.version, "hip", None)
    assert dispatch.auto_backend("cuda") == "triton"  # there is no such device here to ask
