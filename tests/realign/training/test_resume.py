"""A continued run ends as one that never stopped: weights, optimizer, generators and log."""

from __future__ import annotations

import dataclasses
import io
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from transformers import PrinterCallback

from realign.config import LoraSection
from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.callbacks import LogLastStep, MetricsFile, ShowProgress
from realign.training.checkpoints import checkpoints, newest_checkpoint
from realign.training.trainer import RDPOConfig, RDPOTrainer


@pytest.fixture(scope="module")
def reference(model_dir: Path, make_reference) -> dict[str, torch.Tensor]:
    return make_reference(model_dir, 12)


def flipped(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image.rotate(rng.choice([0, 90, 180]))


class FlippedImages(Dataset[Record]):
    """Records whose images are changed at random, by seed, epoch and row."""

    def __init__(self, rows: list[Record], seed: int = 3) -> None:
        self.rows, self.seed = rows, seed
        # in shared memory: workers that live longer than an epoch see the next one
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader when an epoch begins."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = self.rows[index]
        rng = random.Random(f"{self.seed} {int(self.epoch)} {row.id}")
        images, rejected = (
            tuple(png(flipped(image, rng)) for image in row.open_images(rejected=is_rejected))
            for is_rejected in (False, True)
        )
        changed = dataclasses.replace(row, images=images, rejected_images=rejected)
        vars(changed)["key"] = row.key  # a cached property: the reference is found by the original
        return changed


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def train(
    model_dir: Path,
    folder: Path,
    rows: list[Record] | FlippedImages,
    reference: dict[str, torch.Tensor],
    *,
    resume: Path | bool | None = None,
    lora: LoraSection | None = None,
    dtype: torch.dtype = torch.float32,
    **options,
) -> RDPOTrainer:
    """Two epochs, a checkpoint every step; the last one is the whole end of the run."""
    model = load_model(model_dir, dtype)
    torch.manual_seed(0)
    if lora:
        model = add_adapter(
            model, rank=lora.r, alpha=lora.alpha, targets=lora.targets, freeze_vision=True
        )
    args = RDPOConfig(
        output_dir=str(folder / "steps"), report_to="none", use_cpu=True, disable_tqdm=True,
        **{
            "num_train_epochs": 2, "learning_rate": 3e-4, "lr_scheduler_type": "cosine",
            "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
            "check_first_step": not isinstance(rows, FlippedImages), "seed": 3, **options,
        },
    )  # fmt: skip
    callbacks = [LogLastStep(), MetricsFile(folder / "metrics.jsonl"), ShowProgress()]
    trainer = RDPOTrainer(model, args, rows, load_processor(model_dir), reference, callbacks)
    folder.mkdir(exist_ok=True)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def case(name: str, batch_size: int, accumulation: int, steps: tuple[int, ...], **more):
    """Twelve rows; an epoch ends after 3 steps, with an accumulation of 8 after 2."""
    options = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        **{key: value for key, value in more.items() if key != "marks"},
    }
    return pytest.param(options, steps, id=name, marks=more.get("marks", ()))


CASES = [
    case("plain", 4, 1, (2, 3, 4), marks=pytest.mark.full),
    case("workers", 4, 1, (4,), dataloader_num_workers=2, save_steps=2),
    case("accumulation 2", 2, 2, (2,), save_steps=2),
    case("accumulation 8", 1, 8, (1, 2), marks=pytest.mark.full),
    case("workers, all", 4, 1, (1, 2, 3, 5), dataloader_num_workers=2, marks=pytest.mark.slow),
    case("accumulation 2, all", 2, 2, (1, 3, 4, 5), marks=pytest.mark.slow),
    case("accumulation 8, workers", 1, 8, (1, 2, 3), dataloader_num_workers=2,
         marks=pytest.mark.slow),
    case("lasting workers", 4, 1, (2, 3), dataloader_num_workers=2,
         dataloader_persistent_workers=True, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("options", "resumed"), CASES)
def test_a_resumed_run_with_augmented_images_ends_bitwise_equal(
    tmp_path: Path, model_dir, records, reference, options, resumed
) -> None:
    rows = FlippedImages(records(12))
    train(model_dir, tmp_path / "whole", rows, reference, **options)
    last = checkpoints(tmp_path / "whole" / "steps")[-1].name
    expected = files(tmp_path / "whole" / "steps" / last)
    assert not [file for file in expected if file.endswith((".pt", ".pth", ".bin"))]
    for step in resumed:
        folder = tmp_path / f"from {step}"
        start = Path("steps") / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / start, folder / start)
        random.seed(step)  # what other code does to the global generators is of no importance
        torch.manual_seed(step)
        train(model_dir, folder, rows, reference, resume=folder / start, **options)
        assert files(folder / "steps" / last) == expected
        log = (folder / "metrics.jsonl").read_text()
        assert log == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("lora", marks=pytest.mark.full),
        "lora on bfloat16",
        pytest.param("full bfloat16", marks=pytest.mark.full),
    ],
)
def test_adapter_and_16_bit_runs_resume_bitwise_equal(
    tmp_path: Path, model_dir, records, reference, kind
) -> None:
    options = {
        "per_device_train_batch_size": 6,
        "save_steps": 2,
        "lora": LoraSection(r=4, alpha=8) if "lora" in kind else None,
        "dtype": torch.bfloat16 if "bfloat16" in kind else torch.float32,
    }
    rows = records(12)
    train(model_dir, tmp_path / "whole", rows, reference, **options)
    steps = tmp_path / "part" / "steps"
    shutil.copytree(tmp_path / "whole" / "steps" / "checkpoint-2", steps / "checkpoint-2")
    train(model_dir, tmp_path / "part", rows, reference, resume=True, **options)
    assert files(steps / "checkpoint-4") == files(tmp_path / "whole" / "steps" / "checkpoint-4")


@pytest.mark.full
@pytest.mark.parametrize(
    ("saving", "logging"), [(2, 3), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_the_log_does_not_depend_on_save_and_log_intervals(
    tmp_path: Path, model_dir, records, reference, saving, logging
) -> None:
    options = {
        "per_device_train_batch_size": 4,
        "save_steps": saving,
        "logging_steps": logging,
        "logging_first_step": True,
    }
    rows = records(12)
    train(model_dir, tmp_path / "whole", rows, reference, **options)
    for place in (tmp_path / "whole" / "steps").iterdir():
        folder = tmp_path / place.name
        shutil.copytree(place, folder / "steps" / place.name)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n{"st')  # cut off in a line
        train(model_dir, folder, rows, reference, resume=True, **options)
        log = (folder / "metrics.jsonl").read_text()
        assert log == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.full
def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_older_one(
    tmp_path: Path, model_dir, records, reference, capsys
) -> None:
    rows, options = records(12), {"per_device_train_batch_size": 6}
    train(model_dir, tmp_path / "whole", rows, reference, **options)
    steps = tmp_path / "part" / "steps"
    for step in (2, 3):
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / "steps" / name, steps / name)
    weights = steps / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(RefusedError, match=r"got .*checkpoint-3: model.safetensors was cha"):
        train(model_dir, tmp_path / "part", rows, reference, resume=weights.parent, **options)
    capsys.readouterr()
    train(model_dir, tmp_path / "part", rows, reference, resume=True, **options)
    messages = capsys.readouterr().err
    assert "checkpoint-3 is damaged: model.safetensors was changed" in messages
    assert "continuing at step 2 of 4" in messages
    for step in (3, 4):  # the damaged one was replaced on the way
        name = f"checkpoint-{step}"
        assert files(steps / name) == files(tmp_path / "whole" / "steps" / name)


def test_any_damage_to_any_file_is_detected(tmp_path: Path, model_dir, records, reference) -> None:
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    train(model_dir, tmp_path, records(4), reference, **options)
    older, newest = checkpoints(tmp_path / "steps")
    paths = [path for path in newest.rglob("*") if path.is_file()]
    assert {path.name for path in paths} >= {
        "model.safetensors", "optimizer.safetensors", "schedule.safetensors",
        "process-0.safetensors", "trainer_state.json", "config.json",
    }  # fmt: skip
    for path in paths:
        raw = path.read_bytes()
        middle = len(raw) // 2
        flipped_bit = raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]
        for harmed in (flipped_bit, raw[:middle], raw[:-1], raw + b"x", bytes(len(raw)), None):
            path.unlink() if harmed is None else path.write_bytes(harmed)
            assert newest_checkpoint(tmp_path / "steps") == older, path
        path.write_bytes(raw)
    assert newest_checkpoint(tmp_path / "steps") == newest


def test_resuming_without_a_checkpoint_is_refused(
    tmp_path: Path, model_dir, records, reference
) -> None:
    with pytest.raises(RefusedError, match="output_dir must hold a checkpoint"):
        train(model_dir, tmp_path, records(12), reference, resume=True)


@pytest.mark.parametrize(("limit", "left"), [(1, 2), pytest.param(3, 3, marks=pytest.mark.full)])
def test_at_least_two_checkpoints_are_kept(
    tmp_path: Path, model_dir, records, reference, limit, left
) -> None:
    options = {"per_device_train_batch_size": 6, "save_total_limit": limit, "max_steps": 4}
    train(model_dir, tmp_path, records(12), reference, **options)
    kept = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert kept == [f"checkpoint-{step}" for step in range(5 - left, 5)]


def test_images_are_augmented_differently_in_every_epoch(
    records, model_dir, tmp_path, reference
) -> None:
    """Otherwise the runs above would not test random augmentation."""
    rows = records(12)
    changed = FlippedImages(rows)
    by_epoch = []
    for epoch in range(2):
        changed.set_epoch(epoch)
        by_epoch.append([row.images for row in (changed[index] for index in range(12))])
        assert by_epoch[-1] == [changed[index].images for index in range(12)]
    original = [row.images for row in rows]
    assert len({str(images) for images in (*by_epoch, original)}) == 3
    assert [changed[index].key for index in range(12)] == [row.key for row in rows]
    train(model_dir, tmp_path, changed, reference, per_device_train_batch_size=6)
    assert int(changed.epoch) == 1
