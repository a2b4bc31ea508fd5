"""The facts of a training run, each found once: model, numerics, objective, rows, reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from realign.config import Effect, TrainConfig
from realign.data.dataset import read_kept_records
from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.folder import resolve_model
from realign.modeling.identity import Identity, ModelFacts
from realign.modeling.loading import choose_dtype
from realign.modeling.row_index import RowIndex
from realign.reference.scoring import Scoring
from realign.training.objectives import ObjectiveOptions, make_objective
from realign_kernels import Objective

SCHEMA = 2  # version of the content of run folders and of train.json


@dataclass(frozen=True)
class TrainPlan:
    """Facts of a run that are known before it starts.

    Attributes:
        config: The run's options.
        objective: The objective of the run.
        records: The rows of the dataset without the dropped ones.
        scoring: How the reference scores rows, with the numerics of the policy.
        identity: Identity of the reference log-probabilities.
        rows: Facts of the records; empty until the records are read.
    """

    config: TrainConfig
    objective: Objective
    records: Sequence[Record]
    scoring: Scoring
    identity: Identity
    rows: RowIndex = field(default_factory=RowIndex)

    @classmethod
    def of(cls, config: TrainConfig) -> TrainPlan:
        """Return the plan of a run: open its model and its dataset, and check its options.

        Raises:
            RefusedError: The model or the dataset cannot be opened, or options do not fit.
        """
        objective = make_objective(ObjectiveOptions.of(config))  # before a model is downloaded
        accumulation_steps(config)
        folder = resolve_model(config.model)
        records = read_kept_records(config.data, config.images)
        scoring = Scoring(
            folder,
            max(objective.num_cells, 3),  # one cache serves dpo, rdpo and mdpo
            config.rejected_scoring,
            Numerics.of(config.marked(Effect.NUMBERS), weights_dtype(config)),
            batch_size=max(config.batch_size, 4),
            max_length=config.max_length,
        )
        return cls(config, objective, records, scoring, scoring.identity())

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.scoring.folder

    @property
    def model(self) -> ModelFacts:
        """Facts of the model that are known without its weights."""
        return self.scoring.model

    @property
    def numerics(self) -> Numerics:
        """Numerics of policy and reference."""
        return self.scoring.numerics

    def claim(self, num_processes: int) -> dict[str, Any]:
        """Return everything that the result depends on, to be stored in the run folder."""
        return {
            "schema": SCHEMA,
            "config": self.config.model_dump(
                mode="json", exclude=set(self.config.marked(Effect.NONE))
            ),
            "model": self.identity["semantics"]["files"],
            "rows": self.rows.keys,
            "processes": num_processes,
        }


def world_size() -> int:
    """Return the number of processes that train together, as their launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(config: TrainConfig) -> int:
    """Return the number of micro-batches that each process accumulates per step.

    Raises:
        RefusedError: The processes cannot share the pairs of a step in whole micro-batches.
    """
    pairs_per_micro_step = config.batch_size * world_size()
    steps, rest = divmod(config.pairs_per_step, pairs_per_micro_step)
    if rest:
        below, above = steps * pairs_per_micro_step, (steps + 1) * pairs_per_micro_step
        nearest = f"{below} or {above}" if below else str(above)
        raise RefusedError(
            f"train.pairs_per_step must be a multiple of {pairs_per_micro_step}, which is "
            f"batch_size {config.batch_size} x {world_size()} "
            f"process{'es' if world_size() > 1 else ''}, got {config.pairs_per_step}. Set it to "
            f"{nearest}, or change batch_size or the number of processes."
        )
    return steps


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the policy's weights.

    Full fine-tuning requires float32: updates of 1e-5 vanish in bfloat16.
    """
    if config.dtype == "auto" and not config.lora:
        return torch.float32
    return choose_dtype(config.dtype)
