"""A checkpoint that cannot be written ends the run, and never harms an older checkpoint."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from realign.config import TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.checkpoints import checkpoints, newest_checkpoint
from realign.training.run import train
from realign.training.trainer import RDPOConfig, RDPOTrainer
from tests.realign.conftest import file_limit


class FullDisk(TrainerCallback):
    """No file may become longer, from the first checkpoint on."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


# the first file, one in the middle, and the weights
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(10, marks=pytest.mark.full),
        2000,
        pytest.param(1_000_000, marks=pytest.mark.full),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, model_dir, records, make_reference, limit
) -> None:
    def trainer(*callbacks: TrainerCallback) -> RDPOTrainer:
        args = RDPOConfig(
            output_dir=str(tmp_path / "steps"), report_to="none", use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=2, num_train_epochs=1,
            save_strategy="steps", save_steps=1, logging_steps=1,
        )  # fmt: skip
        model, rows = load_model(model_dir, torch.float32), records(4)
        reference = make_reference(model_dir, 4)
        made = RDPOTrainer(model, args, rows, load_processor(model_dir), reference, [*callbacks])
        made.remove_callback(PrinterCallback)
        return made

    with (
        file_limit(resource.RLIM_INFINITY),  # and after it what it was before
        pytest.raises(RefusedError, match=r"steps/checkpoint-2 could not be written: "),
    ):
        trainer(FullDisk(limit)).train()
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path / "steps") == tmp_path / "steps" / "checkpoint-1"
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert len(checkpoints(tmp_path / "steps")) == 2


@pytest.mark.parametrize("limit", [10, 1_000_000])
def test_a_full_disk_at_the_end_leaves_the_steps(
    tmp_path: Path, model_dir, records, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(records(4), tmp_path / "pairs.parquet")
    config = TrainConfig(
        model=str(model_dir), data=tmp_path / "pairs.parquet", out=tmp_path / "run",
        batch_size=2, pairs_per_step=2, save_steps=1,
    )  # fmt: skip
    save_model = RDPOTrainer.save_model

    def save_in_little_room(trainer: RDPOTrainer, folder: str, **options: bool) -> None:
        if folder.endswith(".checkpoint.tmp"):  # not one of a step
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save_model(trainer, folder, **options)

    with monkeypatch.context() as patch, file_limit(resource.RLIM_INFINITY):
        patch.setattr(RDPOTrainer, "save_model", save_in_little_room)
        with pytest.raises(
            RefusedError, match=r"run/checkpoint could not be written \(.*too large"
        ):
            train(config)
    assert not (tmp_path / "run" / ".checkpoint.tmp").exists()
    assert newest_checkpoint(tmp_path / "run" / "steps").name == "checkpoint-2"
    assert train(config).is_dir()
    assert not (tmp_path / "run" / "steps").exists()
