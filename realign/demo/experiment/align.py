"""One training run of the experiment, by the package's trainer, with measurements of the model
after some steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, set_seed

from realign.data.records import Record
from realign.demo.experiment.protocol import PAIRS_PER_STEP, WARMUP_STEPS, Condition
from realign.errors import RefusedError
from realign.modeling.acceleration import Numerics
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from realign.reference import Scoring
from realign.training.objectives import WITHOUT_IMAGE_PAIR, ObjectiveOptions, make_objective
from realign.training.trainer import RDPOConfig, RDPOTrainer

LORA_RANK, LORA_ALPHA = 32, 64
REFERENCE_PAIRS = 32  # in one forward of the reference
MeasureAt = Callable[[int, Any], None]


def align(
    condition: Condition,
    learning_rate: float,
    beta: float,
    seed: int,
    records: Sequence[Record],
    base: Path,
    processor: Any,
    steps: Sequence[int],
    measure_at: MeasureAt,
) -> dict[str, float]:
    """Train the base model on pairs.

    Args:
        condition: Condition to train under.
        learning_rate: Learning rate after the warm-up.
        beta: Beta of the text pair and of the image pair.
        seed: Seed of the order of rows and of adapters.
        records: Pairs to train on.
        base: Folder of the base model, which is also the reference.
        processor: Processor of the base model.
        steps: Steps after which ``measure_at`` is called with the step and the model.
        measure_at: Function that measures the model without changing its weights.
    Returns:
        The trainer's last log line: rewards, margins, log-probabilities and loss.
    Raises:
        FloatingPointError: A loss or a gradient is not finite.
        RefusedError: There are fewer pairs than one step takes.
    """
    if len(records) < PAIRS_PER_STEP:
        raise RefusedError(
            f"a seed must give at least {PAIRS_PER_STEP} pairs, got {len(records)}. Draw more "
            "scenes."
        )
    options = objective_options(condition, beta)
    set_seed(seed)
    model: Any = load_model(base, torch.float32)
    if condition.lora:
        model = add_adapter(
            model, rank=LORA_RANK, alpha=LORA_ALPHA, targets="all-linear", freeze_vision=True
        )
    with tempfile.TemporaryDirectory() as folder:
        arguments = RDPOConfig(
            output_dir=folder,
            **options,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=WARMUP_STEPS,
            max_steps=max(steps),
            per_device_train_batch_size=PAIRS_PER_STEP,
            dataloader_drop_last=True,  # every step reads as many rows
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_steps=max(steps),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RDPOTrainer(
            model,
            arguments,
            records,
            processor,
            reference_of(records, condition, options, base),
            callbacks=[_MeasureAt(steps, measure_at)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
    return {name: value for name, value in logged.items() if _is_of_objective(name)}


def objective_options(condition: Condition, beta: float) -> dict[str, Any]:
    """Return the trainer's options for the objective of a condition."""
    options: dict[str, Any] = {
        "objective": condition.objective,
        "beta": beta,
        "nll_weight": condition.nll_weight,
        "rejected_scoring": condition.rejected_scoring,
    }
    if condition.objective not in WITHOUT_IMAGE_PAIR:
        options["image_weight"] = condition.image_weight
    return options


def reference_of(
    records: Sequence[Record], condition: Condition, options: Mapping[str, Any], base: Path
) -> dict[str, Tensor]:
    """Return record key to the base model's log-probabilities of the objective's cells."""
    scoring = Scoring(
        base,
        max(3, make_objective(ObjectiveOptions(**options)).num_cells),  # what a forward scores
        condition.rejected_scoring,
        Numerics(torch.float32),
    )
    scorer = scoring.load()
    found: dict[str, Tensor] = {}
    for start in range(0, len(records), REFERENCE_PAIRS):
        part = records[start : start + REFERENCE_PAIRS]
        for record, logps in zip(part, torch.from_numpy(scorer.score(part).logps), strict=True):
            found[record.key] = logps
    return found


def _is_of_objective(name: str) -> bool:
    return name == "loss" or name.startswith(("rewards/", "logps/"))


class _MeasureAt(TrainerCallback):
    """Callback that measures the model after some steps."""

    def __init__(self, steps: Sequence[int], measure_at: MeasureAt) -> None:
        self.steps = {*steps}
        self.measure_at = measure_at

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the model in evaluation mode, then return to training mode."""
        if state.global_step in self.steps:
            model.eval()
            self.measure_at(state.global_step, model)
            model.train()
