"""Options of training on the embedded model: their effects and the combinations they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import Trainer

from realign.config import LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.modeling.loading import load_model
from realign.training.arguments import training_arguments
from realign.training.run import train
from realign.training.trainer import RDPOTrainer

LORA = LoraSection(r=4, alpha=8)


@pytest.fixture
def data(tmp_path: Path, records) -> Path:
    path = tmp_path / "dataset.parquet"
    write_parquet(records(4), path)
    return path


def run(model_dir: Path, data: Path, out: Path, **options: Any) -> Path:
    given = {"batch_size": 2, "pairs_per_step": 2, "learning_rate": 1e-3, "logging_steps": 1}
    return train(TrainConfig(model=str(model_dir), data=data, out=out, **given | options))


def metrics(checkpoint: Path) -> list[dict[str, float]]:
    text = (checkpoint.parent / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_projector": True}, "train_projector requires lora.* Add lora"),
        ({"quantization": "nf4"}, "quantization requires lora.* Add lora"),
        (
            {"lora": {}, "train_projector": True, "freeze_projector": True},
            "train_projector is set while freeze_projector is",
        ),
        (
            {"projector_learning_rate": 1e-5, "freeze_projector": True},
            "projector_learning_rate is set while freeze_projector is",
        ),
        ({"freeze_projector": True, "freeze_language": True}, "leave nothing to train"),
        ({"autocast": True, "lora": {}}, "autocast is set with lora"),
        ({"autocast": True, "dtype": "bfloat16"}, "autocast is set with dtype bfloat16"),
        ({"attention": "flash", "dtype": "float32"}, "attention is flash with dtype float32"),
        ({"warmup_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(model="m", data=Path("d"), out=Path("o"), **options)


@pytest.mark.parametrize("part", ["projector", "language"])
def test_a_frozen_part_keeps_its_weights_and_the_rest_trains(
    tmp_path: Path, model_dir: Path, data: Path, part: str
) -> None:
    checkpoint = run(model_dir, data, tmp_path / "run", **{f"freeze_{part}": True})
    before = load_file(model_dir / "model.safetensors")
    after = load_file(checkpoint / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_projector = {name for name in before if "multi_modal_projector" in name}
    of_language = {name for name in before if "language_model" in name or "lm_head" in name}
    assert moved == (of_language if part == "projector" else of_projector)


def test_the_projector_trains_with_adapters_and_is_saved_with_them(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    options = {"lora": LORA, "train_projector": True, "dtype": "bfloat16", "epochs": 2}
    checkpoint = run(model_dir, data, tmp_path / "run", projector_learning_rate=2e-3, **options)
    saved = load_file(checkpoint / "adapter_model.safetensors")
    of_projector = {name: t for name, t in saved.items() if "multi_modal_projector" in name}
    assert len(of_projector) == 4
    assert {t.dtype for t in of_projector.values()} == {torch.float32}
    tuned, base = load_model(checkpoint, torch.float32), load_model(model_dir, torch.float32)
    weights = dict(tuned.named_parameters())
    for name, value in base.model.multi_modal_projector.named_parameters():
        (loaded,) = (p for n, p in weights.items() if n.endswith(f"modules_to_save.default.{name}"))
        assert not torch.equal(loaded, value)
        # Adam's first steps are of the size of the rate, at its peak and half of it
        assert (loaded - value).abs().max() < 2 * 2e-3 + 4e-3
    # it is loaded unrounded, and trains on from where it was
    halved = load_model(checkpoint, torch.bfloat16)
    copies = {n: p for n, p in halved.named_parameters() if "modules_to_save" in n}
    assert all(torch.equal(p, weights[n]) for n, p in copies.items())
    again = run(checkpoint, data, tmp_path / "again", dtype="bfloat16", learning_rate=1e-4)
    assert metrics(again)[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-3)


def test_autocast_keeps_float32_weights_and_has_its_own_reference(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    checkpoint = run(model_dir, data, tmp_path / "cast", autocast=True, learning_rate=1e-5)
    plain = run(model_dir, data, tmp_path / "plain", learning_rate=1e-5)
    cast_line, plain_line = metrics(checkpoint)[0], metrics(plain)[0]
    # computed in bfloat16, like its reference and unlike the other run
    assert cast_line["logps/chosen"] != pytest.approx(plain_line["logps/chosen"], abs=1e-4)
    assert cast_line["loss"] == pytest.approx(2 * math.log(2), abs=0.05)
    weights = load_file(checkpoint / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    (identity,) = (tmp_path / "cast" / "cache").glob("*/identity.json")
    assert json.loads(identity.read_text())["numerics"]["autocast"] is True
    # updates of 1e-5 are kept
    before = load_file(model_dir / "model.safetensors")
    name = next(name for name in before if name.endswith("up_proj.weight"))
    assert (weights[name] != before[name]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("schedule", "shares"),
    # after 0, 1, 2 and 3 of 4 steps, the first of them warm-up
    [
        ("cosine", [0, 1, 0.75, 0.25]),
        ("linear", [0, 1, 2 / 3, 1 / 3]),
        ("constant", [0, 1, 1, 1]),
    ],
)
def test_schedules_have_the_expected_learning_rates(
    tmp_path: Path, schedule: str, shares: list[float]
) -> None:
    config = TrainConfig(
        model="m",
        data=tmp_path,
        out=tmp_path,
        schedule=schedule,
        learning_rate=1e-3,
        warmup_ratio=0.25,
        pairs_per_step=1,
    )
    trainer = Trainer(torch.nn.Linear(1, 1), training_arguments(config, num_records=4))
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    rates = []
    for _ in shares:
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([1e-3 * share for share in shares])


def test_layouts_and_workers_change_only_rounding(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    plain = run(model_dir, data, tmp_path / "plain", lora=LORA)
    for name, options in (("separate", {"shared_prefix": False}), ("workers", {"workers": 1})):
        other = run(model_dir, data, tmp_path / name, lora=LORA, **options)
        for a, b in zip(metrics(plain), metrics(other), strict=True):
            # before the first step, the sign of a margin is that of its rounding
            counted = [key for key in a if a["step"] > 1 or "accuracies" not in key]
            for key in counted:
                assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (name, key)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_projectors_rate_and_weights(
    tmp_path: Path, model_dir: Path, data: Path, monkeypatch
) -> None:
    options = {"lora": LORA, "train_projector": True, "projector_learning_rate": 2e-3}
    options |= {"epochs": 2, "save_steps": 1}
    whole = run(model_dir, data, tmp_path / "whole", **options)
    compute_loss = RDPOTrainer.compute_loss

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RDPOTrainer, "compute_loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(model_dir, data, tmp_path / "stopped", **options)
    again = run(model_dir, data, tmp_path / "stopped", **options)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(again) == metrics(whole)
