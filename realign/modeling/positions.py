"""Positions in a collated batch: every token has the position that it has in its own sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from realign.modeling.families import FIRST_POSITION
from realign.modeling.image_features import ImageUse
from realign.modeling.packing import Packing, SharedRow


def rope_positions(
    body: Any, inputs: dict[str, Any], packing: Packing | None, images: ImageUse | None
) -> Tensor | None:
    """Return ``position_ids`` for the model, or None if it computes them correctly itself.

    Args:
        body: The VLM without its head.
        inputs: The model's inputs in the batch: ``input_ids`` (rows, T) and, for families with
            spatial positions of image tokens, ``mm_token_type_ids`` and ``image_grid_thw``.
        packing: Layout of a packed row; None for separate rows.
        images: The images that the rows show.
    """
    ids: Tensor = inputs["input_ids"]
    if hasattr(body, "get_rope_index") and "mm_token_type_ids" in inputs:
        return _spatial(body, inputs, packing, images).to(ids.device, non_blocking=True)
    if packing is None:
        return None
    first = FIRST_POSITION.get(body.config.model_type, 0)
    plain = [
        _packed(torch.arange(first, first + row.prefix + row.answers[0]), row)
        for row in packing.rows
    ]
    return torch.cat(plain)[None].to(ids.device, non_blocking=True)


def _spatial(
    body: Any, inputs: dict[str, Any], packing: Packing | None, images: ImageUse | None
) -> Tensor:
    """Return the positions of M-RoPE, shape ``(3, rows, T)``, from the family's own function for
    single sequences. They are computed on the CPU, because that function reads every token on the
    host.
    """
    ids, types = inputs["input_ids"].cpu(), inputs["mm_token_type_ids"].cpu()
    if packing is None:
        mask = inputs["attention_mask"].cpu()
    else:
        spans = [slice(row.start, row.answer_starts[0] + row.answers[0]) for row in packing.rows]
        ids, types, mask = (
            pad_sequence([line[0, span] for span in spans], batch_first=True)
            for line in (ids, types, torch.ones_like(ids))
        )
    grids = None
    if images is not None:
        sets = inputs["image_grid_thw"].cpu().split(list(images.counts))
        grids = torch.cat([sets[index] for index in images.rows])
    positions, _ = body.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask
    )
    if packing is None:
        return positions
    return torch.cat(
        [
            _packed(positions[:, index, : row.prefix + row.answers[0]], row)
            for index, row in enumerate(packing.rows)
        ],
        dim=-1,
    )[:, None]


def _packed(positions: Tensor, row: SharedRow) -> Tensor:
    """Return the positions of a row, shape ``(..., tokens)``, from those of its prefix and first
    answer; the other answers begin at the same position as the first.
    """
    others = [positions[..., row.prefix : row.prefix + length] for length in row.answers[1:]]
    return torch.cat([positions, *others], dim=-1)
