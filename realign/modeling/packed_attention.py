"""Attention over a packed row (:class:`realign.modeling.packing.Packing`): every answer attends to
its own prefix and itself in a separate call, so no large mask is needed and nothing is padded.

It is registered with transformers as ``realign_sdpa`` and ``realign_flash``. Without a packing in
its arguments it calls the function that it is built on, so generation and other calls of the model
do not change. The masks of a family's layers (sliding windows, bidirectional image blocks) come
from the family's own mask functions, which :func:`_keep_mask_function` keeps instead of turning
them into matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import (
    repeat_kv,
    sdpa_attention_forward,
    use_gqa_in_sdpa,
)
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

from realign.modeling.packing import ATTENTIONS, Packing, SharedRow

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PackedAttention:
    """Packing and masks for the layers of one forward, which the backward may compute again.

    Args:
        packing: The layout.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        # one per kind of layer, in the order in which the model asked for masks
        self.mask_functions: list[MaskFunction] = []
        self._masks: dict[tuple[int, SharedRow, int], Tensor | None] = {}

    def mask(self, kind: int, row: SharedRow, answer: int, device: torch.device) -> Tensor | None:
        """Return the attention mask of an answer's queries, shape ``(queries, prefix + answer)``,
        True where a query sees a key. The first answer's queries include the prefix. None stands
        for a square causal mask.
        """
        key = (kind, row, answer)
        if key not in self._masks:
            self._masks[key] = self._make_mask(self.mask_functions[kind], row, answer, device)
        return self._masks[key]

    def _make_mask(
        self, sees: MaskFunction, row: SharedRow, answer: int, device: torch.device
    ) -> Tensor | None:
        if answer == 0 and sees is causal_mask_function:
            return None
        keys = torch.arange(row.start, row.start + row.prefix + row.answers[answer], device=device)
        queries = keys if answer == 0 else keys[row.prefix :]
        # not a scalar: indexing with one makes the host wait for its value
        zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
        return sees(zero, zero, queries[:, None], keys[None, :]).expand(len(queries), len(keys))


_active: ContextVar[PackedAttention | None] = ContextVar("packed_attention", default=None)


@contextmanager
def packed_attention(packing: Packing) -> Iterator[dict[str, PackedAttention]]:
    """Within the block, leave a model's masks to attention. Yield arguments for the model."""
    packed = PackedAttention(packing)
    token = _active.set(packed)
    try:
        yield {"packed": packed}
    finally:
        _active.reset(token)


def _keep_mask_function(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    def keep(*args: Any, **kwargs: Any) -> Any:
        packed = _active.get()
        if packed is None:
            return make_mask(*args, **kwargs)
        packed.mask_functions.append(kwargs.get("mask_function", causal_mask_function))
        # Models pass a mask of four dimensions on unchanged. The length of its last dimension is
        # the index of the mask function, so that the host need not wait for a value.
        kind = len(packed.mask_functions) - 1
        return torch.empty(1, 1, 0, kind, dtype=torch.bool, device=kwargs.get("device"))

    return keep


class _Segment(NamedTuple):
    """Consecutive queries of a row: its prefix and first answer together, or one other answer."""

    row: SharedRow
    answer: int
    length: int


def _segments(packing: Packing) -> list[_Segment]:
    """Return the segments of all rows, in order and without gaps."""
    return [
        _Segment(row, answer, length + (row.prefix if answer == 0 else 0))
        for row in packing.rows
        for answer, length in enumerate(row.answers)
    ]


def _seen(tensor: Tensor, segments: list[_Segment]) -> Iterator[Tensor]:
    """Yield the keys or values of each segment, shape ``(1, heads, keys, head_dim)``."""
    # split once: the gradient of a slice would be as long as the whole row
    first: Tensor | None = None
    for segment, own in zip(segments, _split(tensor, segments), strict=True):
        if segment.answer == 0:
            first = own
            yield own
        else:
            assert first is not None
            yield torch.cat([first[:, :, : segment.row.prefix], own], dim=2)


def _split(tensor: Tensor, segments: list[_Segment]) -> tuple[Tensor, ...]:
    return tensor.split([segment.length for segment in segments], dim=2)


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    _check_arguments(kwargs)
    groups = query.shape[1] // key.shape[1]
    segments = _segments(packed.packing)
    outputs = []
    for segment, queries, keys, values in zip(
        segments,
        _split(query, segments),
        _seen(key, segments),
        _seen(value, segments),
        strict=True,
    ):
        mask = packed.mask(attention_mask.shape[-1], segment.row, segment.answer, query.device)
        # as in transformers: only kernels without a mask support grouped heads
        if not (enable_gqa := groups > 1 and use_gqa_in_sdpa(mask, keys, values)):
            keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
        outputs.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=enable_gqa,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the same with flash-attention's kernel for sequences of different lengths, whose
    causal mask is aligned to the last key. It has not run on a GPU yet.
    """
    if packed is None:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError(
                f"flash-attention must have a mask of two dimensions, got "
                f"{tuple(attention_mask.shape)}: it would be ignored. Use SDPA."
            )
        return flash_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    from flash_attn import flash_attn_varlen_func

    assert attention_mask is not None
    softcap = kwargs.pop("softcap", None)
    _check_arguments(kwargs)
    # under autocast, rotary embeddings return float32
    query, key = query.to(value.dtype), key.to(value.dtype)
    sees = packed.mask_functions[attention_mask.shape[-1]]
    if sees is not causal_mask_function and sliding_window is None:
        raise NotImplementedError(
            f"flash-attention must have causal layers, got {type(module).__name__} with a mask of "
            "its own. Use SDPA."
        )
    segments = _segments(packed.packing)
    keys, values = (
        torch.cat([*_seen(tensor, segments)], dim=2)[0].transpose(0, 1) for tensor in (key, value)
    )
    query_lengths = [segment.length for segment in segments]
    key_lengths = [
        segment.length + (segment.row.prefix if segment.answer else 0) for segment in segments
    ]
    output = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        keys,
        values,
        cu_seqlens_q=_offsets(query_lengths, query.device),
        cu_seqlens_k=_offsets(key_lengths, query.device),
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output[None], None


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would change the result if they were ignored."""
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"attention over packed rows must not have {name}, got one. Set shared_prefix to "
                "false."
            )
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout must be 0, got {kwargs['dropout']}.")


AttentionInterface.register("realign_sdpa", _sdpa)
AttentionInterface.register("realign_flash", _flash)
AttentionMaskInterface.register("realign_sdpa", _keep_mask_function(sdpa_mask))
AttentionMaskInterface.register("realign_flash", _keep_mask_function(flash_attention_mask))


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make a model's decoder accept packed rows, if its attention function has such a variant."""
    config = model.config.get_text_config()
    config._attn_implementation = ATTENTIONS.get(
        config._attn_implementation, config._attn_implementation
    )
