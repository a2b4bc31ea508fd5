"""Facts about a checkpoint from the files of its training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from realign.config import TrainConfig
from realign.errors import RefusedError
from realign.runtime.files import read_jsonl
from realign.runtime.strict_json import read_json

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run.

    Attributes:
        folder: Folder of the run.
        options: Options of ``realign train`` from ``train.json``.
        base_files: File name to hash of the model from which training started.
        processes: Number of processes that trained together.
        written: Content of ``checkpoint.json``: base, data, pairs, steps, hashes of the weights;
            empty for runs of earlier versions.
        last: Last line of ``metrics.jsonl``.
    """

    folder: Path
    options: Mapping[str, Any]
    base_files: Mapping[str, str]
    processes: int
    written: Mapping[str, Any]
    last: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> RunFacts:
        """Read the files of a run's folder.

        Raises:
            RefusedError: A file is damaged.
        """
        train = read_json(folder / "train.json")
        if not isinstance(train, dict) or not isinstance(train.get("config"), dict):
            raise RefusedError(
                f"{folder / 'train.json'} must be one of `realign train`, got {train!r:.60}. Give "
                "another --run."
            )
        lines = folder / "metrics.jsonl"
        metrics = read_jsonl(lines) if lines.is_file() else []
        return cls(
            folder,
            train["config"],
            train.get("model", {}),
            train.get("processes", 1),
            checkpoint_facts(folder),
            metrics[-1] if metrics else {},
        )

    @cached_property
    def changed(self) -> dict[str, Any]:
        """Name to value of the options that differ from their defaults."""
        defaults = {
            name: field.get_default(call_default_factory=True)
            for name, field in TrainConfig.model_fields.items()
        }
        return {name: value for name, value in self.options.items() if value != defaults.get(name)}

    @property
    def pairs_per_step(self) -> int:
        """Pairs behind one update of the weights."""
        pairs: int = self.options["pairs_per_step"]
        return pairs


def checkpoint_facts(run: Path) -> dict[str, Any]:
    """Return the content of ``checkpoint.json``; empty for a run of an earlier version without it.

    Raises:
        RefusedError: It is damaged.
    """
    path = run / "checkpoint.json"
    if not path.is_file():
        return {}
    facts = read_json(path)
    if not isinstance(facts, dict) or not isinstance(facts.get("weights"), dict):
        raise RefusedError(
            f"{path} must be one of `realign train`, got {facts!r:.60}. Remove it to go on without "
            "what it says."
        )
    return facts


def own_weights(files: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of weights among those of a model's files, without an adapter's base."""
    return {
        name: digest
        for name, digest in files.items()
        if name.endswith(WEIGHTS) and not name.startswith("base/")
    }
