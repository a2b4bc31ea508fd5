"""Runs of RdpoTrainer are runs of TRL's DPOTrainer, step after step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from realign.modeling.adapters import quiet_peft
from tests.realign.integrations.trl.stock import (
    cached_reference,
    ours,
    pairs,
    reference_model,
    stock,
    text_half,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PAIRS = 16
OF_EVALUATION = [
    f"eval_{name}"
    for name in ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")
]
TRAINING = {"per_device_train_batch_size": 2, "max_steps": 50, "learning_rate": 5e-5}


def lines(trainer: Any) -> list[dict[str, float]]:
    """Return the log of a run: every step and every evaluation."""
    with quiet_peft():
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]


def largest(name: str, found: list[dict[str, float]], truth: list[dict[str, float]]) -> float:
    """The largest difference of a number."""
    values = [[line[name] for line in run if name in line] for run in (found, truth)]
    assert len(values[0]) == len(values[1]) > 0
    return float((torch.tensor(values[0]) - torch.tensor(values[1])).abs().max())


@pytest.mark.full
def test_fifty_steps_of_the_text_term_follow_stock_dpo(tmp_path: Path) -> None:
    options = {"train_dataset": pairs(PAIRS, 3), "training": TRAINING}
    truth = lines(stock(tmp_path, **options))
    reference = cached_reference(PAIRS, 3)
    found = lines(ours(tmp_path, objective=text_half(), reference=reference, **options))
    assert len(found) == 50
    assert truth[-1]["loss"] < truth[0]["loss"] - 0.2
    assert largest("loss", found, truth) <= 2e-6
    assert largest("rewards/margins", found, truth) <= 1e-5
    assert largest("mean_token_accuracy", found, truth) == 0
    assert largest("entropy", found, truth) <= 1e-5


@pytest.mark.full
def test_fifty_steps_of_rdpo_follow_stock_dpo_of_both_pairs(tmp_path: Path) -> None:
    options = {"train_dataset": pairs(PAIRS, 3), "training": TRAINING}
    truth = lines(stock(tmp_path, image_pairs=True, **options))
    for path in ({"reference": cached_reference(PAIRS, 3)}, {"data_path": "native"}):
        found = lines(ours(tmp_path, **path, **options))
        assert truth[-1]["loss"] < truth[0]["loss"] - 0.2
        assert largest("loss", found, truth) <= 5e-6


@pytest.mark.full
@pytest.mark.parametrize("is_text", [True, False])
def test_adapter_training_with_accumulation_and_evaluation_follows_stock_dpo(
    tmp_path: Path, is_text: bool
) -> None:
    """The model with disabled adapters is the reference, so no rows are known in advance."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": ["lm_head"]}
    options = {
        "train_dataset": pairs(PAIRS, 3),
        "eval_dataset": pairs(5, 4),
        "training": {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6,
            "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 3,
            "per_device_eval_batch_size": 4, "gradient_checkpointing": True,
        },
    }  # fmt: skip
    with quiet_peft():
        theirs = stock(
            tmp_path, image_pairs=not is_text, model=reference_model(), ref_model=None,
            peft_config=LoraConfig(**lora), **options,
        )  # fmt: skip
        truth = lines(theirs)
        objective = text_half() if is_text else None
        for path in ({},) if is_text else ({}, {"data_path": "native"}):
            found = lines(
                ours(
                    tmp_path, model=reference_model(), objective=objective,
                    peft_config=LoraConfig(**lora), **path, **options,
                )
            )  # fmt: skip
            assert truth[0]["loss"] > truth[-2]["loss"] + 0.01
            for name in ("loss", "eval_loss"):
                assert largest(name, found, truth) <= 2e-6
            if is_text:
                for name in OF_EVALUATION:
                    assert largest(name, found, truth) <= 2e-4, name
