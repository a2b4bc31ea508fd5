"""The native data path: TRL's collator and its fused head, with the image pair beside the answer
pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.utils import pad

from realign.errors import RefusedError
from realign_kernels import Objective, RdpoStatsOutput, preference_loss


@dataclass
class NativeCollator(DataCollatorForVisionPreference):
    """Collator of rows cell by cell, ``[v y_w | v y_l | v_l y_w]`` and, of four, ``[v_l y_l]``.

    Attributes:
        num_cells: Number of cells of a pair that the objective reads, 2 to 4.
    """

    num_cells: int = 3

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Let TRL collate the answer pairs and the image pairs, and join the two."""
        # TRL's collator changes the rows in place
        batch = super().torch_call([dict(example) for example in examples])
        if self.num_cells == 2:
            return batch
        retrieved = super().torch_call([self._with_retrieved(example) for example in examples])
        for name, values in batch.items():
            others = retrieved[name]
            if self.num_cells == 3:
                others = others[: len(others) // 2]  # the second half has the rejected answers
            fill = self.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = _joined(values, others, fill or 0)
        return batch

    def _with_retrieved(self, example: Mapping[str, Any]) -> dict[str, Any]:
        images = example.get("images", [example.get("image")])
        retrieved = example.get("rejected_images") or []
        if len(retrieved) != len(images):
            raise RefusedError(
                f"rejected_images must be as many as images with data_path='native', got "
                f"{len(retrieved)} for {len(images)} in the row with prompt "
                f"{example.get('prompt')!r:.80}. Add them, remove the row, or pass data_path='own'."
            )
        pair = {name: value for name, value in example.items() if name != "image"}
        rejected = example["rejected"] if self.num_cells == 4 else example["chosen"]
        return {**pair, "images": retrieved, "rejected": rejected}


@dataclass(frozen=True)
class GivenCollator:
    """Wrapper of a user's collator that checks the number of rows of every batch. The rows of TRL's
    own collator would otherwise be mistaken for other cells.

    Attributes:
        collate: The user's collator.
        num_cells: Number of cells of a pair that the objective reads.
    """

    collate: Callable[[list[Any]], dict[str, Any]]
    num_cells: int

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Return the batch of the user's collator.

        Raises:
            RefusedError: The batch does not have one row for each cell of each pair.
        """
        batch = self.collate(examples)
        if len(batch["input_ids"]) != self.num_cells * len(examples):
            raise RefusedError(
                f"data_collator must return {self.num_cells} rows per pair, cell by cell, got "
                f"{len(batch['input_ids'])} rows for {len(examples)} pairs. Leave it out for "
                "[v y_w | v y_l | v_l y_w], or let it return as many."
            )
        return batch


def _joined(values: Any, others: Any, fill: int) -> Any:
    """Return the entries of both, padded on the right where their shapes differ."""
    if not isinstance(values, Tensor):
        return [*values, *others]
    if values.shape[1:] == others.shape[1:]:
        return torch.cat([values, others])
    return pad([*values, *others], padding_value=fill, padding_side="right")


@dataclass(frozen=True)
class NativeBatch:
    """A batch of :class:`NativeCollator` in the form of TRL's models.

    Attributes:
        inputs: Arguments of the model.
        completion_mask: 1 where a token is scored, shape ``(C * P, T)``.
        num_cells: Number of cells C.
    """

    inputs: dict[str, Any]
    completion_mask: Tensor
    num_cells: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], num_cells: int) -> NativeBatch:
        """Return a collator's batch in this form."""
        inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
        mask = batch["completion_mask"]
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        return cls({**inputs, "labels": labels, "use_cache": False}, mask, num_cells)

    @property
    def num_tokens(self) -> Tensor:
        """Return the number of scored tokens of every cell and pair, (C, P)."""
        return self.completion_mask[:, 1:].sum(1).view(self.num_cells, -1)

    def score(self, model: Any, **options: Any) -> Any:
        """Return the outputs of TRL's fused head for the batch."""
        return model(**self.inputs, **options, fused_lm_head=True)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over the scored tokens, (C, P).

        Args:
            values: One value per position except the last; an adapter's virtual tokens come first.
        """
        mask = self.completion_mask[:, 1:]
        kept = values[:, -mask.shape[1] :]
        return torch.where(mask > 0, kept, 0.0).sum(1).view(self.num_cells, -1)

    def output(self, outputs: Any, ref_logps: Tensor, objective: Objective) -> RdpoStatsOutput:
        """Return the loss and the logged results of a batch, as with ``data_path="own"``.

        Args:
            outputs: The policy's outputs from :meth:`score`.
            ref_logps: Summed log-probabilities of the reference, (C, P).
            objective: The objective of the run.
        """
        logps, num_tokens = self.sums(outputs.log_probs), self.num_tokens
        preference = preference_loss(logps, ref_logps, objective, num_tokens=num_tokens)
        counts = num_tokens.clamp(min=1)
        means = [
            self.sums(values.detach().to(logps.dtype)) / counts
            for values in (outputs.entropy, outputs.mean_logits, outputs.is_top1)
        ]
        return RdpoStatsOutput(
            preference.loss,
            logps,
            num_tokens,
            preference.rewards,
            preference.text_margins,
            preference.image_margins,
            *means,
        )
