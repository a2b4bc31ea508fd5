"""Batches of preference pairs, built cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from realign_kernels.validation import check_number, check_tensor

if TYPE_CHECKING:
    from torch import Tensor


def stack_cells(
    chosen: Tensor,
    text_rejected: Tensor,
    image_rejected: Tensor | None = None,
    both_rejected: Tensor | None = None,
    *,
    padding_value: float | None = None,
) -> Tensor:
    """Return the cells of P pairs as one tensor, in the order that the losses read.

    A batch in the wrong order has the same shape, so it would train on other pairs without an
    error.  This function makes sequence ``c * P + p`` cell c of pair p.

    Args:
        chosen: Values of the chosen answers with their images, one entry per pair: sums of
            log-probabilities ``(P,)``, or anything with more dimensions, such as token ids,
            attention masks and labels ``(P, T)``, hidden states ``(P, T, D)`` or images
            ``(P, 3, H, W)``.
        text_rejected: The same for the rejected answers with the images of the chosen ones.
        image_rejected: The same for the chosen answers with the retrieved images; None for DPO.
        both_rejected: The same for the rejected answers with the retrieved images; None for rDPO.
        padding_value: Value that pads shorter cells on the right, up to the longest T; None refuses
            cells of different lengths. Pass -100 for labels, 0 for attention masks, and the id of
            the padding token for token ids.
    Returns:
        cells: Shape ``(C, P)`` of sums, and ``(C * P, ...)`` of anything else, for C = 2, 3 or 4
            cells; the dtype and device of ``chosen``.  It is differentiable.
    Raises:
        ValueError: Cells differ in shape or device, a cell is a single number, the cells cannot
            hold ``padding_value``, or ``both_rejected`` is given without ``image_rejected``.
        TypeError: A cell is not a tensor, or has another dtype than ``chosen``.

    Example::

        >>> import torch
        >>> from realign_kernels import stack_cells
        >>> stack_cells(torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6]))
        tensor([[1, 2],
                [3, 4],
                [5, 6]])
        >>> labels = torch.tensor([[7, 8, 9]]), torch.tensor([[7, 8]])
        >>> stack_cells(*labels, padding_value=-100)
        tensor([[   7,    8,    9],
                [   7,    8, -100]])
    """
    if image_rejected is None and both_rejected is not None:
        raise ValueError(
            "image_rejected must be given with both_rejected, got None. Pass all four cells, or "
            "leave both out for DPO."
        )
    cells = {"chosen": chosen, "text_rejected": text_rejected}
    if image_rejected is not None:
        cells["image_rejected"] = image_rejected
    if both_rejected is not None:
        cells["both_rejected"] = both_rejected
    for name, cell in cells.items():
        _check_cell(name, cell, chosen)
    if padding_value is not None:
        _check_padding_value(padding_value, chosen.dtype)
        longest = max(cell.shape[1] for cell in cells.values()) if chosen.ndim > 1 else 0
        cells = {name: _padded(cell, longest, padding_value) for name, cell in cells.items()}
    expected = cells["chosen"].shape
    for name, cell in cells.items():
        if cell.shape != expected:
            differs_in_length = cell.ndim > 1 and cell.shape[2:] == expected[2:]
            remedy = "Resize it."
            if differs_in_length:
                remedy = "Pass padding_value, such as -100 for labels."
            raise ValueError(
                f"{name} must have shape {tuple(expected)} to match chosen, "
                f"got {tuple(cell.shape)}. {remedy}"
            )
    stacked = [*cells.values()]
    return torch.stack(stacked) if chosen.ndim == 1 else torch.cat(stacked)


def _check_cell(name: str, cell: Tensor, chosen: Tensor) -> None:
    """Refuse a cell that cannot be stacked with the chosen one, whatever its length."""
    check_tensor(name, cell)
    if cell.ndim == 0:
        raise ValueError(
            f"{name} must hold one entry per pair, got a single number. Sum over tokens only."
        )
    if cell.ndim != chosen.ndim or len(cell) != len(chosen):
        raise ValueError(
            f"{name} must hold one entry for each of the {len(chosen)} pairs in {chosen.ndim} "
            f"dimensions, as chosen does, got {tuple(cell.shape)}. Build every cell from the same "
            "pairs."
        )
    if cell.dtype != chosen.dtype:
        raise TypeError(
            f"{name} must be {chosen.dtype} to match chosen, got {cell.dtype}. Cast it."
        )
    if cell.device != chosen.device:
        raise ValueError(
            f"{name} must be on {chosen.device} to match chosen, got {cell.device}. "
            f"Call .to({str(chosen.device)!r})."
        )


def _padded(cell: Tensor, length: int, value: float) -> Tensor:
    """Pad the sequences of a cell on the right."""
    missing = length - cell.shape[1] if cell.ndim > 1 else 0
    if not missing:
        return cell
    # Not by F.pad, which takes the value as a float64 and so rounds large integers.
    is_integer = not (cell.is_floating_point() or cell.is_complex())
    shape = cell.shape[0], missing, *cell.shape[2:]
    padding = cell.new_full(shape, int(value) if is_integer else float(value))
    return torch.cat([cell, padding], dim=1)


def _check_padding_value(value: float, dtype: torch.dtype) -> None:
    """Refuse a value that the cells cannot hold."""
    if not (dtype == torch.bool and isinstance(value, bool)):
        check_number("padding_value", value)
    if dtype == torch.bool:
        is_held = value in (0, 1)
    elif dtype.is_floating_point or dtype.is_complex:
        is_held = abs(value) <= torch.finfo(dtype).max
    else:
        limits = torch.iinfo(dtype)
        is_held = value == int(value) and limits.min <= value <= limits.max
    if not is_held:
        raise ValueError(
            f"padding_value must be a value of {dtype} to match chosen, got {value}. "
            "Pass one that the cells can hold, or cast them."
        )
