"""RDPOTrainer as other code calls it: its refusals, and the settings that it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.errors import RefusedError
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.trainer import RDPOConfig, RDPOTrainer


def trainer(model, model_dir: Path, tmp_path: Path, rows, reference, **options) -> RDPOTrainer:
    args = RDPOConfig(
        output_dir=str(tmp_path / "steps"), report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, save_strategy="no", **options,
    )  # fmt: skip
    return RDPOTrainer(model, args, rows, load_processor(model_dir), reference)


def test_a_reference_that_lacks_a_row_is_refused(tmp_path: Path, model_dir, records) -> None:
    rows = records(3)
    reference = {row.key: torch.zeros(3).double() for row in rows[:2]}
    with pytest.raises(ValueError, match="lacks 1, first: row r2"):
        trainer(load_model(model_dir, torch.float32), model_dir, tmp_path, rows, reference)


def test_an_unknown_objective_is_refused(tmp_path: Path, model_dir, records) -> None:
    with pytest.raises(ValueError, match=r"objective must be one of .*'rdpo'.*, got 'ppo'"):
        trainer(
            load_model(model_dir, torch.float32),
            model_dir,
            tmp_path,
            records(1),
            {},
            objective="ppo",
        )


def test_training_switches_dropout_off(tmp_path: Path, model_dir, records) -> None:
    rows = records(2)
    model = load_model(model_dir, torch.float32)
    layer = next(module for module in model.modules() if hasattr(module, "attention_dropout"))
    layer.attention_dropout = 0.5
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Dropout(0.5))
    trainer(model, model_dir, tmp_path, rows, {row.key: torch.zeros(3) for row in rows})
    assert layer.attention_dropout == 0.0
    assert model.lm_head[1].p == 0.0


def test_a_micro_batch_is_not_scattered_over_the_gpus_of_a_process(
    tmp_path: Path, model_dir, records, monkeypatch
) -> None:
    monkeypatch.setattr(RDPOConfig, "n_gpu", property(lambda args: args._n_gpu or 2))
    rows = records(2)
    reference = {row.key: torch.zeros(3) for row in rows}
    model = load_model(model_dir, torch.float32)
    made = trainer(model, model_dir, tmp_path, rows, reference)
    assert made.args.n_gpu == 1


def test_save_only_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="save_only_model must be false"):
        RDPOConfig(output_dir=str(tmp_path), save_only_model=True, use_cpu=True)
