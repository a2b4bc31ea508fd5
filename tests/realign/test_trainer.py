"""RDPOTrainer as other code calls it: its guards, and the checkpoint that it continues from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from realign.modeling import load_model, load_processor
from realign.trainer import RDPOConfig, RDPOTrainer, newest_checkpoint


def trainer(model, model_dir: Path, tmp_path: Path, rows, reference, **options) -> RDPOTrainer:
    args = RDPOConfig(
        output_dir=str(tmp_path / "steps"), report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, save_strategy="no", **options,
    )  # fmt: skip
    return RDPOTrainer(model, args, rows, load_processor(model_dir), reference)


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(
    tmp_path: Path, model_dir, records
) -> None:
    rows = records(4)
    reference = {row.key: torch.full((3,), torch.nan).double() for row in rows}
    model = load_model(model_dir, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match=r"loss of step 1 must be finite.* for rows r\d, r"
    ):
        trainer(model, model_dir, tmp_path, rows, reference).train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


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


def test_dropout_is_off(tmp_path: Path, model_dir, records) -> None:
    rows = records(2)
    model = load_model(model_dir, torch.float32)
    layer = next(module for module in model.modules() if hasattr(module, "attention_dropout"))
    layer.attention_dropout = 0.5
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Dropout(0.5))
    trainer(model, model_dir, tmp_path, rows, {row.key: torch.zeros(3) for row in rows})
    assert layer.attention_dropout == 0.0
    assert model.lm_head[1].p == 0.0


def test_unfinished_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step, complete in ((2, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "complete").write_text("")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    shutil.rmtree(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path) is None
