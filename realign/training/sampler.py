"""Distribution of pairs over ranks. Optimizer steps do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler

from realign.data.records import Record


class PairSampler(Sampler[list[int]]):
    """Sampler of the micro-batches of one rank.

    An epoch is one shuffled order of all pairs, drawn from the seed and the epoch. Each micro-step
    takes the next ``batch_size * num_ranks`` pairs and splits them evenly among the ranks. An
    optimizer step is thus ``batch_size * accumulation * num_ranks`` consecutive pairs of that
    order, and the result depends only on this product. All ranks have the same number of
    micro-steps and no pair occurs twice, so at the end of an epoch a micro-batch may be short, or
    empty (see :class:`FilledCollator`).

    Args:
        num_pairs: Number of pairs in the dataset; > 0.
        batch_size: Number of pairs in a full micro-batch of one rank.
        rank: Number of this process, in ``[0, num_ranks)``.
        num_ranks: Number of processes that share the pairs.
        seed: Seed of the order.
        shuffle: Whether to shuffle; False keeps the order of the dataset.
        drop_last: Whether to leave out a last micro-step that is not full.
    """

    def __init__(
        self,
        num_pairs: int,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.num_pairs = num_pairs
        self.pairs_per_step = batch_size * num_ranks
        self.rank, self.num_ranks = rank, num_ranks
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        rest = 0 if self.drop_last else self.pairs_per_step - 1
        return (self.num_pairs + rest) // self.pairs_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(len(self)):
            pairs = order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]
            start, end = (len(pairs) * i // self.num_ranks for i in (self.rank, self.rank + 1))
            yield pairs[start:end]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_pairs))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.num_pairs, generator=generator).tolist()


class HasImages(Protocol):
    """A record, or the facts of one."""

    @property
    def images(self) -> Sequence[Any]:
        """The row's images."""


class FilledCollator:
    """Collator that makes every rank run the same modules; otherwise ranks would wait for each
    other forever.

    A rank without pairs gets the filler row as its micro-batch, without ``ids``: the trainer counts
    pairs by their ids, so the row has no weight. A micro-batch without an image gets the images of
    the filler row as ``unseen_images`` (:mod:`realign.modeling.image_features`).

    Args:
        collator: A :class:`realign.modeling.collate.PreferenceCollator`.
        filler: Reads the filler row, which has images if any row has; called on first use.
        has_images: Whether the filler row has images.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Record]], dict[str, Any]],
        filler: Callable[[], Record],
        *,
        has_images: bool,
    ) -> None:
        self.collator = collator
        self.filler = filler
        self.has_images = has_images
        self._filler_batch: dict[str, Any] | None = None

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the collator's batch, completed from the filler row if necessary."""
        if not records:
            return {**self._filled(), "ids": []}
        batch = self.collator(records)
        if batch["images"] is None and self.has_images:
            filled = self._filled()
            batch["unseen_images"] = {name: filled[name] for name in filled.keys() - batch.keys()}
        return batch

    def _filled(self) -> dict[str, Any]:
        if self._filler_batch is None:
            self._filler_batch = self.collator([self.filler()])
        return self._filler_batch


def choose_filler(rows: Iterable[HasImages]) -> int:
    """Return the position of the first row with an image, or 0 if no row has one."""
    return next((index for index, row in enumerate(rows) if row.images), 0)
