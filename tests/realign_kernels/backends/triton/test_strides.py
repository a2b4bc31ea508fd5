"""Rows of tiles and of the stash are aligned for any vocabulary, as GPUs need for vector loads."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, rdpo_loss
from realign_kernels.backends import torch as plain_kernels
from realign_kernels.backends import triton as kernels
from realign_kernels.ops import score_tokens
from realign_kernels.testing import dense_logprob, make_head_inputs
from realign_kernels.tiling import TileShape

MODES = ["frozen", "stash", "recompute", "tile"]
SETS = {"triton": kernels, "eager": plain_kernels}


@pytest.fixture(params=SETS)
def seen(request, monkeypatch):
    """Tiles that a kernel set is given, and the operands of its products."""
    module, matrices = SETS[request.param], []

    def epilogue(tile, original=module.epilogue):
        matrices.append(tile.logits)
        if tile.exponentials is not None:
            matrices.append(tile.exponentials)
        original(tile)

    def product(out, a, b, *, adds, original=module.product):
        matrices.extend(part for part in (out, a, b, a.T, b.T) if part.stride(1) == 1)
        original(out, a, b, adds=adds)

    monkeypatch.setattr(module, "epilogue", epilogue)
    monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(module, "LARGEST_TILE", TileShape(4, 256))
    return request.param, matrices


@pytest.mark.parametrize("vocabulary", [385, 321, 257])
@pytest.mark.parametrize("memory", MODES)
def test_rows_are_aligned(memory, vocabulary, seen):
    backend, matrices = seen
    inputs = make_head_inputs(6, vocabulary, 64, torch.float16)
    leaves, exact = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    if memory == "frozen":
        leaves.lm_head_weight.requires_grad_(False)
    if memory == "tile":
        loss = rdpo_loss(
            leaves.hidden_states[:, None], leaves.lm_head_weight, inputs.labels[:, None],
            torch.zeros(3, 2), backend=backend, memory=memory,
        ).loss  # fmt: skip
    else:
        loss = leaves.call(
            linear_logprob, backend=backend, memory="auto" if memory == "frozen" else memory
        ).sum()
    loss.backward()
    wide = [matrix for matrix in matrices if matrix.shape[0] > 1 and matrix.shape[1] >= 64]
    assert any(matrix.shape[1] == vocabulary % 256 for matrix in matrices)  # the last tile
    for matrix in (*wide, *(part for part in matrices if part.shape == (4, vocabulary % 256))):
        assert matrix.stride(0) % 64 == 0, (matrix.shape, matrix.stride())
    if memory != "tile":
        dense_logprob(exact).sum().backward()
        error = leaves.hidden_states.grad - exact.hidden_states.grad
        assert error.norm() <= 2e-3 * exact.hidden_states.grad.norm()


@pytest.mark.parametrize("vocabulary", [50257, 92553, 32003])
def test_rows_of_the_stash_are_aligned(vocabulary):
    head = score_tokens.HeadArguments(
        torch.zeros(2, 1), torch.zeros(vocabulary, 1, dtype=torch.bfloat16), None, None, None,
        1.0, [1.0, 0.0, 1.0], None, "triton", [1 << 20, 1 << 20], None,
    )  # fmt: skip
    assert head.stash_width() % 64 == 0
    assert 0 <= head.stash_width() - vocabulary < 64
    assert head.stash_row_bytes() == 2 * head.stash_width()


def test_alignment_padding_of_rows_is_zero(poison_empty):
    """Nothing uninitialised is kept for the backward."""
    inputs = make_head_inputs(5, 70, 8, torch.float16).as_leaves()
    kept = []

    def pack(tensor):
        if tensor.ndim == 2 and tensor.shape[1] == 128:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs.call(linear_logprob, backend="triton", memory="stash")
    assert len(kept) == 1
    assert (kept[0][:, 70:] == 0).all()
