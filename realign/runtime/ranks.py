"""Several processes of one run, as `accelerate launch` and `torchrun` start them.

Their messages are small and go through gloo, on the CPU, with a timeout of a day, since one process
may compute for hours while the others wait.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from realign.errors import RefusedError
from realign.runtime.write_errors import explain_write_errors

T = TypeVar("T")
PATIENCE = timedelta(days=1)
# other machines see a new file on a network file system only after their folder cache expires
FILE_SECONDS = 60.0


def is_distributed() -> bool:
    """Return whether a launcher started this process as one of several."""
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU."""
    if is_distributed():
        # accelerate chooses the same backend as later for training
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _state() -> PartialState:
    # the first call also creates training's process group, in which ranks wait for the writing one
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


class Ranks:
    """The processes of this run; one process is a run of one rank.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self._group: Any = None
        if is_distributed():
            state = _state()
            self.rank, self.world_size = state.process_index, state.num_processes
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Return whether this process writes the files that are written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order; every rank waits for all others."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def run_together(self, work: Callable[[], T]) -> T:
        """Run work on every rank; if it fails on one rank, fail on all with the first message.

        Raises:
            RefusedError: The work raised one on some rank. The same holds for FloatingPointError.
        """
        result, failure = None, None
        try:
            result = work()
        except (RefusedError, FloatingPointError) as error:
            if self._group is None:
                raise
            failure = (isinstance(error, RefusedError), str(error))
        for rank, failed in enumerate(self.gather(failure)):
            if failed is not None:
                kind = RefusedError if failed[0] else FloatingPointError
                raise kind(f"rank {rank}: {failed[1]}")
        return result  # type: ignore[return-value]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run work on the first rank only, and return its result on every rank.

        Raises:
            RefusedError: The work raised one. The same holds for FloatingPointError.
        """
        found = self.run_together(lambda: work() if self.is_first else None)
        return self.gather(found)[0]  # type: ignore[return-value]

    def check_folder_is_shared(self, folder: Path) -> None:
        """Refuse a folder that ranks do not share, since the others would not find its files.

        Raises:
            RefusedError: A rank does not see a file that the first rank writes.
        """
        if self._group is None:
            return
        token = folder / f".shared-{self.gather(uuid.uuid4().hex)[0]}"

        def leave() -> None:
            if self.is_first:
                with explain_write_errors(token):
                    token.touch()

        self.run_together(leave)
        deadline = time.monotonic() + FILE_SECONDS
        while not token.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [rank for rank, sees in enumerate(self.gather(token.exists())) if not sees]
        if self.is_first:
            token.unlink(missing_ok=True)
        if blind:
            raise RefusedError(
                f"out {folder} must be on a file system that all ranks share, ranks "
                f"{', '.join(map(str, blind))} do not see what rank 0 writes there. Choose a "
                "shared --out, or build on one machine and copy the cache."
            )

    def check_agreement(self, root: str, place: Path) -> None:
        """Refuse caches that differ between ranks, whose references would then differ.

        Raises:
            RefusedError: The root hashes differ.
        """
        roots = self.gather(root)
        if len(set(roots)) > 1:
            other = next(rank for rank, found in enumerate(roots) if found != roots[0])
            raise RefusedError(
                f"cache {place} must be the same on every rank, got root hash {roots[0][:16]} on "
                f"rank 0 and {roots[other][:16]} on rank {other}. Copy one to all machines."
            )
