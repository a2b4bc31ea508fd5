"""Layouts of the answers of a micro-batch in its rows, shared by collator, model and loss.

``separate`` has one padded row per cell, as in other trainers. ``shared prefix`` has a single row
without padding: ``[v, x | y_w | y_l]`` and ``[v_l, x | y_w]`` of every pair, one after the other.
Image and prompt are computed once for both answers, and attention
(:mod:`realign.modeling.packed_attention`) lets no answer see the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from realign.errors import RefusedError
from realign.runtime.progress import announce

# transformers' attention functions, and the variants for packed rows that are built on them
ATTENTIONS = {"sdpa": "realign_sdpa", "flash_attention_2": "realign_flash"}
# Layers that see other tokens through attention alone; a recurrent layer would carry the state of
# one answer into the next.
SHARING_LAYERS = {"full_attention", "sliding_attention"}

Layout = Literal["shared prefix", "separate"]


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A prefix and the answers that follow it, as part of a packed row.

    Attributes:
        start: Index of the prefix's first token.
        prefix: Number of tokens of the prefix: images and prompt.
        answers: Number of tokens of every answer, the longest first. All answers have the positions
            of the first one, as if each followed the prefix directly.
    """

    start: int
    prefix: int
    answers: tuple[int, ...]

    @property
    def answer_starts(self) -> tuple[int, ...]:
        """Indices of the answers' first tokens."""
        return tuple(accumulate(self.answers[:-1], initial=self.start + self.prefix))

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.prefix + sum(self.answers)

    def predicting(self, answer: int) -> list[int]:
        """Return the index of the token that predicts each token of an answer."""
        start = self.answer_starts[answer]
        last_of_prefix = self.start + self.prefix - 1
        return [last_of_prefix, *range(start, start + self.answers[answer] - 1)]


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of one packed row, in numbers on the host.

    Attributes:
        rows: The shared rows, in order, without gaps.
    """

    rows: tuple[SharedRow, ...]

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, Sequence[int]]]) -> Packing:
        """Return the layout for the lengths of prefixes and of their answers, the longest first."""
        rows: list[SharedRow] = []
        for prefix, answers in lengths:
            if sorted(answers, reverse=True) != list(answers):
                raise ValueError(f"answers must be sorted, the longest first, got {answers}.")
            rows.append(SharedRow(rows[-1].end if rows else 0, prefix, tuple(answers)))
        return cls(tuple(rows))


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Return the reason why a model's answers cannot share a prefix; None if they can."""
    config = model.config.get_text_config()
    decoder = model.model.get_decoder() if hasattr(model.model, "get_decoder") else model.model
    name = type(decoder).__name__
    attention = config._attn_implementation
    if attention not in (*ATTENTIONS, *ATTENTIONS.values()):
        return f"attention {attention!r} is not one of {', '.join(ATTENTIONS)}"
    if others := set(getattr(config, "layer_types", None) or ()) - SHARING_LAYERS:
        return f"{name} has layers of type {', '.join(sorted(others))}"
    if getattr(decoder, "_is_stateful", False):
        return f"{name} is recurrent"
    if not getattr(decoder, "_supports_attention_backend", False):
        return f"{name} does not support other attention functions"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores"
    return None


def choose_layout(model: nn.Module, shared_prefix: bool | None = None) -> Layout:
    """Return the layout of a model's batches. If a model cannot share prefixes, announce why.

    Args:
        model: A VLM, or an adapter on one.
        shared_prefix: Whether to share prefixes; None shares them if the model can.
    Raises:
        RefusedError: ``shared_prefix`` is true and the model cannot.
    """
    vlm: Any = model
    base = vlm.get_base_model() if hasattr(vlm, "get_base_model") else vlm
    reason = why_not_shared(base)
    if shared_prefix is False:
        return "separate"
    if reason is None:
        return "shared prefix"
    if shared_prefix:
        raise RefusedError(
            f"shared_prefix must not be true for this model: {reason}. Leave it out for one row "
            "per sequence."
        )
    announce(f"a row for every answer instead of a shared prefix: {reason}")
    return "separate"
