"""The sequence that each token belongs to.  Knows no preferences.

Sequences are cell-major: sequence ``c * P + p`` is cell c of pair p.  Letters: **P** pairs, **C**
cells, **S** = C * P sequences, **T** positions, **N** packed tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from realign_kernels.validation import assert_on_device, check_int64, value_checks_enabled


class PairShape(NamedTuple):
    """Cells by pairs."""

    num_cells: int
    num_pairs: int

    @property
    def num_sequences(self) -> int:
        """Sequences in a batch of this shape."""
        return self.num_cells * self.num_pairs


def resolve_pair_shape(
    hidden_states: Tensor,
    ref_logps: Tensor | None,
    sequence_ids: Tensor | None,
    sequence_lengths: Tensor | None,
    default_num_cells: int,
) -> PairShape:
    """Return (C, P) from whichever argument says it, and refuse those that disagree."""
    is_packed = sequence_ids is not None
    _check_form(hidden_states, is_packed=is_packed)
    if sequence_lengths is not None:
        _check_lengths(sequence_lengths, ref_logps)
        shape = PairShape(*sequence_lengths.shape)
    elif ref_logps is not None:
        if ref_logps.ndim != 2:
            raise ValueError(f"ref_logps must have shape (C, P), got {tuple(ref_logps.shape)}.")
        shape = PairShape(*ref_logps.shape)
    elif is_packed:
        raise ValueError(
            "sequence_lengths must be given for packed tokens without ref_logps, got None."
        )
    else:
        num_sequences = hidden_states.shape[0]
        if num_sequences % default_num_cells != 0:
            raise ValueError(
                f"hidden_states must hold a multiple of {default_num_cells} sequences "
                f"to match objective, got {num_sequences}."
            )
        shape = PairShape(default_num_cells, num_sequences // default_num_cells)
    if not is_packed and hidden_states.shape[0] != shape.num_sequences:
        raise ValueError(
            f"hidden_states must hold {shape.num_sequences} sequences to match "
            f"{shape.num_cells} cells of {shape.num_pairs} pairs, got {hidden_states.shape[0]}."
        )
    return shape


def _check_form(hidden_states: Tensor, *, is_packed: bool) -> None:
    if is_packed and hidden_states.ndim != 2:
        raise ValueError(
            f"hidden_states must have shape (N, D) with sequence_ids, "
            f"got {tuple(hidden_states.shape)}. Leave sequence_ids out for padded batches."
        )
    if not is_packed and hidden_states.ndim != 3:
        raise ValueError(
            f"hidden_states must have shape (C * P, T, D) without sequence_ids, "
            f"got {tuple(hidden_states.shape)}. Pass sequence_ids for packed tokens."
        )


def _check_lengths(sequence_lengths: Tensor, ref_logps: Tensor | None) -> None:
    check_int64("sequence_lengths", sequence_lengths)
    if sequence_lengths.device.type != "cpu":
        raise ValueError(f"sequence_lengths must be on the CPU, got {sequence_lengths.device}.")
    if sequence_lengths.ndim != 2 or (
        ref_logps is not None and sequence_lengths.shape != ref_logps.shape
    ):
        expected = "(C, P)" if ref_logps is None else f"{tuple(ref_logps.shape)} to match ref_logps"
        raise ValueError(
            f"sequence_lengths must have shape {expected}, got {tuple(sequence_lengths.shape)}."
        )


def check_sequence_ids(sequence_ids: Tensor, labels: Tensor) -> None:
    """Refuse ids of the wrong shape, type or device."""
    if sequence_ids.shape != labels.shape:
        raise ValueError(
            f"sequence_ids must have shape {tuple(labels.shape)} to match labels, "
            f"got {tuple(sequence_ids.shape)}."
        )
    check_int64("sequence_ids", sequence_ids)
    if sequence_ids.device != labels.device:
        raise ValueError(
            f"sequence_ids must be on {labels.device} to match labels, got {sequence_ids.device}."
        )


def check_sequence_id_values(sequence_ids: Tensor, is_scored: Tensor, num_sequences: int) -> None:
    """Refuse ids out of range where a token is scored."""
    if not value_checks_enabled():
        return
    is_bad = is_scored & ((sequence_ids < 0) | (sequence_ids >= num_sequences))
    if is_bad.is_cuda:
        assert_on_device(~is_bad.any(), _ids_rule(num_sequences))
    elif is_bad.any():
        index = int(torch.nonzero(is_bad)[0])
        raise ValueError(
            f"sequence_ids must be in [0, {num_sequences}), "
            f"got {int(sequence_ids[index])} at index {index}."
        )


def checks_counts(device: torch.device) -> bool:
    """Return whether lengths that lie on the host are compared with counts on a device."""
    # A graph would read the host's memory again at every replay.
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return value_checks_enabled() and not is_captured


def check_counts(num_tokens: Tensor, sequence_lengths: Tensor) -> None:
    """Refuse lengths that are not those of the labels."""
    if not checks_counts(num_tokens.device):
        return
    if num_tokens.is_cuda:
        expected = sequence_lengths.to(num_tokens.device, non_blocking=True)
        assert_on_device((num_tokens == expected).all(), _COUNTS_RULE)
    elif not torch.equal(num_tokens, sequence_lengths):
        cell, pair = torch.nonzero(num_tokens != sequence_lengths)[0].tolist()
        raise ValueError(
            f"{_COUNTS_RULE}, "
            f"got {int(sequence_lengths[cell, pair])} for cell {cell} of pair {pair}, "
            f"which has {int(num_tokens[cell, pair])}."
        )


def assert_pairs_fit(ids_fit: Tensor | None, counts_fit: Tensor | None, num_sequences: int) -> None:
    """Stop the device where a kernel has found ids or counts that do not fit."""
    if ids_fit is not None:
        assert_on_device(ids_fit, _ids_rule(num_sequences))
    if counts_fit is not None:
        assert_on_device(counts_fit, f"{_COUNTS_RULE}.")


_COUNTS_RULE = "sequence_lengths must equal the answer tokens in labels"


def _ids_rule(num_sequences: int) -> str:
    return f"sequence_ids must be in [0, {num_sequences})."
