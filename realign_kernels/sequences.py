"""Sequences of a batch of pairs: shapes, the sequence of each token, and lengths.

Sequences are cell-major: sequence ``c * P + p`` is cell c of pair p.  Letters: **P** pairs, **C**
cells, **S** = C * P sequences, **T** positions, **N** packed tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from realign_kernels.validation import (
    assert_on_device,
    check_cell_shape,
    check_floating,
    check_int64,
    check_tensor,
    find_swapped,
    value_checks_enabled,
)


class PairShape(NamedTuple):
    """Cells by pairs."""

    num_cells: int
    num_pairs: int

    @property
    def num_sequences(self) -> int:
        """Number of sequences in a batch of this shape."""
        return self.num_cells * self.num_pairs


def check_batch(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    sequence_ids: Tensor | None,
    sequence_lengths: Tensor | None,
) -> None:
    """Refuse arguments that are no tensors, look swapped, or are neither padded nor packed."""
    check_tensor("hidden_states", hidden_states)
    check_tensor("lm_head_weight", lm_head_weight)
    check_tensor("labels", labels)
    check_tensor("ref_logps", ref_logps, optional=True)
    check_tensor("sequence_ids", sequence_ids, optional=True)
    check_tensor("sequence_lengths", sequence_lengths, optional=True)
    swapped = find_swapped(hidden_states, lm_head_weight, labels)
    if lm_head_weight.ndim == 3 and hidden_states.ndim == 2:
        swapped = " hidden_states and lm_head_weight seem swapped."
    if ref_logps is not None:
        are_swapped = labels.is_floating_point() and not ref_logps.is_floating_point()
        check_floating(
            "ref_logps", ref_logps, " labels and ref_logps seem swapped." if are_swapped else ""
        )
        # The labels of single-token sequences can have the shape of the reference.
        is_one_per_token = ref_logps.shape == labels.shape == hidden_states.shape[:-1]
        if is_one_per_token and ref_logps.ndim > 0 and ref_logps.shape[-1] > 1:
            raise ValueError(
                f"ref_logps must have shape (C, P), got {tuple(ref_logps.shape)}, one number per "
                "token as labels. Sum over the tokens of every answer, and call "
                "realign_kernels.stack_cells on the sums."
            )
    shape, is_packed = tuple(hidden_states.shape), sequence_ids is not None
    if is_packed and len(shape) != 2:
        raise ValueError(
            f"hidden_states must have shape (N, D) with sequence_ids, got {shape}."
            f"{swapped or ' Leave sequence_ids out for padded batches.'}"
        )
    if not is_packed and len(shape) != 3:
        raise ValueError(
            f"hidden_states must have shape (C * P, T, D) without sequence_ids, got {shape}."
            f"{swapped or ' Pass sequence_ids for packed tokens.'}"
        )


def resolve_pair_shape(
    num_sequences: int | None,
    ref_logps: Tensor | None,
    sequence_lengths: Tensor | None,
    num_cells: tuple[int, int],
) -> PairShape:
    """Return (C, P) from the argument that states it, and refuse those that disagree.

    ``num_sequences`` is that of a padded batch; ``num_cells`` are the fewest and the most cells
    that the objective allows.
    """
    name, given = "ref_logps", ref_logps
    if given is None:
        name, given = "sequence_lengths", sequence_lengths
    if given is not None and given.ndim != 2:
        raise ValueError(
            f"{name} must have shape (C, P), got {tuple(given.shape)}. "
            "Stack one row per cell: chosen, rejected and so on."
        )
    if sequence_lengths is not None:
        _check_lengths(sequence_lengths, ref_logps)
    if given is not None:
        check_cell_shape(name, given, *num_cells)
        shape = PairShape(*given.shape)
    elif num_sequences is None:
        raise ValueError(
            "sequence_lengths must be given for packed tokens without ref_logps, got None. "
            "Pass the number of answer tokens of every cell and pair, (C, P), int64, on the CPU."
        )
    else:
        if num_sequences % num_cells[0] != 0:
            remedy = " 2 cells are DPO: pass objective=Objective.dpo()."
            raise ValueError(
                f"hidden_states must hold a multiple of {num_cells[0]} sequences "
                f"to match objective, got {num_sequences}."
                f"{remedy if num_sequences % 2 == 0 else ' Leave no cell out: mask its labels.'}"
            )
        shape = PairShape(num_cells[0], num_sequences // num_cells[0])
    if num_sequences is not None and num_sequences != shape.num_sequences:
        raise ValueError(
            f"hidden_states must hold {shape.num_sequences} sequences to match {shape.num_cells} "
            f"cells of {shape.num_pairs} pairs in {name}, got {num_sequences}. "
            "Sequence c * P + p is cell c of pair p."
        )
    return shape


def _check_lengths(sequence_lengths: Tensor, ref_logps: Tensor | None) -> None:
    check_int64("sequence_lengths", sequence_lengths)
    if sequence_lengths.device.type != "cpu":
        raise ValueError(
            f"sequence_lengths must be on the CPU, got {sequence_lengths.device}. "
            "Count on the CPU, or leave it out."
        )
    if ref_logps is not None and sequence_lengths.shape != ref_logps.shape:
        remedy = "Give one length for every cell and pair."
        if sequence_lengths.ndim == 2 and sequence_lengths.T.shape == ref_logps.shape:
            remedy = "One of the two looks transposed: both are (C, P)."
        raise ValueError(
            f"sequence_lengths must have shape {tuple(ref_logps.shape)} to match ref_logps, "
            f"got {tuple(sequence_lengths.shape)}. {remedy}"
        )


def check_sequence_ids(sequence_ids: Tensor, labels: Tensor) -> None:
    """Refuse ids of the wrong shape, type or device."""
    if sequence_ids.shape != labels.shape:
        raise ValueError(
            f"sequence_ids must have shape {tuple(labels.shape)} to match labels, "
            f"got {tuple(sequence_ids.shape)}. Give one id for every label."
        )
    check_int64("sequence_ids", sequence_ids)
    if sequence_ids.device != labels.device:
        raise ValueError(
            f"sequence_ids must be on {labels.device} to match labels, got {sequence_ids.device}. "
            f"Call .to({str(labels.device)!r})."
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
    """Return whether lengths on the host are compared with counts on a device."""
    # A captured graph would read the host's memory again at every replay.
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return value_checks_enabled() and not is_captured


def check_counts(num_tokens: Tensor, sequence_lengths: Tensor) -> None:
    """Refuse lengths that differ from the counts of the labels."""
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
    """Stop the device if a kernel has found ids or counts that do not fit."""
    if ids_fit is not None:
        assert_on_device(ids_fit, _ids_rule(num_sequences))
    if counts_fit is not None:
        assert_on_device(counts_fit, f"{_COUNTS_RULE}.")


_COUNTS_RULE = "sequence_lengths must equal the answer tokens in labels"


def _ids_rule(num_sequences: int) -> str:
    return f"sequence_ids must be in [0, {num_sequences})."
