"""The flash variant's calls of flash-attention give the attention of the SDPA variant.

The kernel needs a GPU. Here it is written out from its documentation: sequences one after the
other, the causal mask aligned to the last key, the window counted from that diagonal.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from realign.modeling.packed_attention import PackedAttention
from realign.modeling.packing import Packing

PACKING = Packing.of([(6, (4, 3)), (5, (2,)), (4, (3, 3))])
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def documented_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    left, _ = window_size
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
    keys = zip(cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False)
    for (q0, q1), (k0, k1) in zip(bounds, keys, strict=True):
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        diagonal = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)[None]
        seen = (column <= diagonal) & ((left < 0) | (column >= diagonal - left))
        ks, vs = (t[k0:k1].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], ks) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, vs))
    return torch.cat(outputs)


@pytest.fixture
def flash_attn(monkeypatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = documented_kernel
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def attend(name: str, mask_function, **options) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = PACKING.rows[-1].end
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    packed = PackedAttention(PACKING)
    packed.mask_functions.append(mask_function)
    attention = AttentionInterface()[name]
    mask = torch.empty(1, 1, 0, 0)
    module = nn.Module()
    output, _ = attention(module, query, key, value, mask, packed=packed, scaling=0.3, **options)
    assert output.shape == (1, length, HEADS, HEAD_DIM)
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_flash_attention_equals_sdpa(flash_attn, window: int | None) -> None:
    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    expected = attend("realign_sdpa", sees)
    torch.testing.assert_close(attend("realign_flash", sees, sliding_window=window), expected)


def test_non_causal_layers_are_refused(flash_attn) -> None:
    ahead = or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 40, dtype=torch.int64)))
    with pytest.raises(NotImplementedError, match="flash-attention must have causal layers"):
        attend("realign_flash", ahead)


def test_a_mask_of_four_dimensions_is_refused() -> None:
    states = torch.zeros(1, 1, 2, 4)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="must have a mask of two dimensions"):
        AttentionInterface()["realign_flash"](nn.Module(), states, states, states, mask)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_unsupported_attention_arguments_are_refused(argument: str) -> None:
    with pytest.raises(NotImplementedError, match=f"must not have {argument}"):
        attend("realign_sdpa", causal_mask_function, **{argument: torch.ones(1)})
    with pytest.raises(ValueError, match=r"attention dropout must be 0, got 0\.1"):
        attend("realign_sdpa", causal_mask_function, dropout=0.1)
