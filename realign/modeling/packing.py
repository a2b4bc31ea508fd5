"""Layouts of the answers of a micro-batch in its rows, which collator, model and loss share.

``separate`` has one padded row per cell, as in every trainer. ``shared prefix`` has one row for
all: ``[v, x | y_w | y_l]`` of every pair and then ``[v_l, x | y_w]``, one after the other without
padding. The image and the prompt are computed once for both answers; attention
(:mod:`realign.modeling.packed_attention`) lets no answer see another.
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

# transformers' attention functions to those over packed rows that are built on them
ATTENTIONS = {"sdpa": "realign_sdpa", "flash_attention_2": "realign_flash"}
# Layers that see tokens through attention alone; a recurrent layer would carry one answer's state
# into the next.
SHARING_LAYERS = {"full_attention", "sliding_attention"}

Layout = Literal["shared prefix", "separate"]


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A prefix and the answers that follow it, as they lie in the packed row.

    Attributes:
        start: Index of the prefix's first token.
        prefix: Tokens of the prefix: images and prompt.
        answers: Tokens of every answer, the longest first. For attention and positions, each begins
            where the first one begins, so that the positions and token types of the first one's
            slots are those of all.
    """

    start: int
    prefix: int
    answers: tuple[int, ...]

    @property
    def answer_starts(self) -> tuple[int, ...]:
        """Index of every answer's first token."""
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
    """Layout of one packed row, with the facts that are read on the host.

    Attributes:
        rows: The shared rows, in order, without gaps.
    """

    rows: tuple[SharedRow, ...]

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, Sequence[int]]]) -> Packing:
        """Lay out rows of (tokens of the prefix, tokens of its answers, the longest first)."""
        rows: list[SharedRow] = []
        for prefix, answers in lengths:
            if sorted(answers, reverse=True) != list(answers):
                raise ValueError(f"answers must be sorted, the longest first, got {answers}.")
            rows.append(SharedRow(rows[-1].end if rows else 0, prefix, tuple(answers)))
        return cls(tuple(rows))


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Return why a model's answers cannot share a prefix; None if they can."""
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
        return f"{name} does not take an attention function"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} bounds its attention scores"
    return None


def choose_layout(model: nn.Module, shared_prefix: bool | None = None) -> Layout:
    """Return the layout of a model's batches, and announce why if it is the slower one.

    Args:
        model: A VLM, or an adapter on one.
        shared_prefix: The layout that is requested; None for shared if the model can.
    Raises:
        RefusedError: It is requested and the model cannot.
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
