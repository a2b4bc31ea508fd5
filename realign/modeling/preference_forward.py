"""The preference loss inside a VLM's own forward, because DDP, FSDP and ZeRO hook that call."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from realign.errors import RefusedError
from realign.modeling.families import SEEN_BOTH_WAYS
from realign.modeling.image_features import ImageUse, image_features_by_row, unseen_images_encoded
from realign.modeling.logit_transform import LogitTransform, find_logit_transform
from realign.modeling.packed_attention import packed_attention, use_packed_attention
from realign.modeling.packing import Packing, why_not_shared
from realign.modeling.positions import rope_positions
from realign_kernels import Objective, RdpoOutput, RdpoStatsOutput, rdpo_loss


def attach_preference_forward(model: PreTrainedModel) -> None:
    """Make ``model(**batch)`` compute the preference loss for a batch of
    :class:`realign.modeling.collate.PreferenceCollator`. It returns an :class:`RdpoOutput`, or an
    :class:`RdpoStatsOutput` with ``statistics=True``. Other calls do not change.

    Raises:
        RefusedError: The transform of the model's logits is unknown, its attention would ignore a
            part of its mask, or a trainer of TRL has replaced its forward.
    """
    refuse_fused_head(model)
    refuse_flash(model)
    transform = find_logit_transform(model)
    if why_not_shared(model) is None:
        use_packed_attention(model)
    original = type(model).forward

    @functools.wraps(original)  # generate() and Trainer read the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        answer_labels: Tensor | None = None,
        answer_index: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_tokens: Sequence[Sequence[int]] | None = None,
        packing: Packing | None = None,
        images: ImageUse | None = None,
        unseen_images: Mapping[str, Tensor] | None = None,
        ref_logps: Tensor | None = None,
        objective: Objective | None = None,
        rejected_scoring: str = "label",
        statistics: bool = False,
        **inputs: Any,
    ) -> Any:
        if answer_labels is None:
            return original(self, *args, **inputs)
        assert answer_index is not None
        hidden_states = body_states(
            self, inputs, packing=packing, images=images, unseen_images=unseen_images
        )
        return head_loss(
            self,
            # contains the state that predicts the first token of both answers twice
            hidden_states.flatten(0, 1).index_select(0, answer_index),
            answer_labels,
            ref_logps,
            transform,
            sequence_ids=sequence_ids,
            sequence_lengths=torch.tensor(num_tokens, dtype=torch.int64),
            objective=objective,
            rejected_scoring=rejected_scoring,
            statistics=statistics,
        )

    model.forward = types.MethodType(forward, model)


def refuse_fused_head(model: Any) -> None:
    """Refuse a model whose forward TRL's fused head has replaced: the preference forward would
    replace it again, and calls with ``fused_lm_head=True`` would return plain outputs.

    Raises:
        RefusedError: A trainer of TRL was made with this model.
    """
    code = getattr(model.__dict__.get("forward"), "__code__", None)
    if code is not None and "fused_lm_head" in code.co_varnames:
        raise RefusedError(
            f"model must not have been given to a trainer of TRL before, got a "
            f"{type(model).__name__} with TRL's fused head. Load the model again, and attach the "
            "preference forward before a trainer is made."
        )


def refuse_flash(model: Any) -> None:
    """Refuse flash-attention if it would ignore a part of the model's mask.

    Raises:
        RefusedError: The family attends to some tokens in both directions.
    """
    attention = model.config.get_text_config()._attn_implementation or ""
    seen = SEEN_BOTH_WAYS.get(model.config.model_type)
    if seen and "flash" in attention:
        raise RefusedError(
            f"attention must be sdpa for {type(model).__name__}, which attends to {seen} in both "
            f"directions, got {attention}. Drop that option."
        )


def body_states(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    *,
    packing: Packing | None,
    images: ImageUse | None,
    unseen_images: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the last hidden states of a collated batch, shape ``(rows, T, D)``.

    Args:
        model: The VLM.
        inputs: The model's inputs in the batch.
        packing: Layout of a packed row; None for separate rows.
        images: The images that the rows show.
        unseen_images: Inputs of images to encode although the rows show none, because the rows of
            other ranks may show some.
    """
    body: Any = model.model
    positions = rope_positions(body, inputs, packing, images)
    if positions is not None:
        inputs = {**inputs, "position_ids": positions}
    with ExitStack() as stack:
        if images is not None:
            stack.enter_context(image_features_by_row(body, images))
        if unseen_images is not None:
            stack.enter_context(unseen_images_encoded(body, unseen_images))
        if packing is not None:
            inputs = {**inputs, **stack.enter_context(packed_attention(packing))}
        return body(**inputs, use_cache=False).last_hidden_state


def head_loss(
    model: PreTrainedModel,
    hidden_states: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    transform: LogitTransform,
    *,
    sequence_ids: Tensor | None,
    sequence_lengths: Tensor,
    objective: Objective | None,
    rejected_scoring: str,
    statistics: bool = False,
) -> RdpoOutput | RdpoStatsOutput:
    """Apply :func:`realign_kernels.rdpo_loss` to the hidden states of answer tokens, with the
    model's own head: bias, LoRA, scale and softcap included.

    Raises:
        RefusedError: The head has an adapter that :func:`lora_of_head` refuses.
    """
    head: Any = model.get_output_embeddings()
    lora = lora_of_head(head)
    if hasattr(head, "get_base_layer"):  # peft's wrapper of a linear layer
        head = head.get_base_layer()
    return rdpo_loss(
        hidden_states,
        head.weight,
        labels,
        ref_logps,
        sequence_ids=sequence_ids,
        sequence_lengths=sequence_lengths,
        objective=objective,
        rejected_scoring=rejected_scoring,
        statistics=statistics,
        lm_head_bias=getattr(head, "bias", None),
        lm_head_lora=lora,
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
    )


def lora_of_head(head: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return A, B and the scaling of the active LoRA adapter of an output projection, or None.

    Raises:
        RefusedError: The adapter is of another kind, several are active, or the LoRA computes more
            than ``B A``, which the loss would ignore.
    """
    if not hasattr(head, "get_base_layer") or head.disable_adapters or head.merged:
        return None
    from peft.tuners.lora import LoraLayer

    factors = getattr(head, "lora_A", head.active_adapters)
    active = [name for name in head.active_adapters if name in factors]
    if not active:
        return None  # the active adapter has no weights for this layer
    (name, *others) = active
    is_plain = (
        not others
        and isinstance(head, LoraLayer)
        and isinstance(head.lora_A[name], nn.Linear)
        and name not in head.lora_variant
        and not head.lora_bias[name]
        and not (head.training and getattr(head.lora_dropout[name], "p", 0.0))
    )
    if not is_plain:
        raise RefusedError(
            "the adapter of the output projection must be one plain LoRA without dropout, bias or "
            f"variant, got {type(head).__name__} of peft with {', '.join(active)}. Leave the "
            "output projection out of target_modules, or make its adapter a plain one."
        )
    return head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name]
