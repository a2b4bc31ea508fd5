"""Memory and open files do not grow over five hundred steps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.trainer import RDPOConfig, RDPOTrainer

STEPS = 500


class Watch(TrainerCallback):
    """Resident megabytes and open files after every step."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.files: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.files.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.full
def test_memory_and_open_files_do_not_grow_during_training(
    tmp_path: Path, model_dir, records, make_reference
) -> None:
    args = RDPOConfig(
        output_dir=str(tmp_path / "steps"), report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-5, logging_steps=10,
        save_strategy="steps", save_steps=50, save_total_limit=2,
    )  # fmt: skip
    model, reference = load_model(model_dir, torch.float32), make_reference(model_dir, 16)
    trainer = RDPOTrainer(model, args, records(16), load_processor(model_dir), reference)
    trainer.remove_callback(PrinterCallback)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    settled = 100  # allocators and caches have grown by then
    slope = np.polyfit(np.arange(settled, STEPS), watch.megabytes[settled:], 1)[0] * 100
    print(f"{slope:.3f} MB a hundred steps, {watch.megabytes[-1]:.0f} MB")  # noqa: T201
    assert slope < 1
    assert len(set(watch.files[settled:])) == 1
