"""The line that says what training will take."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from realign.config import LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.modeling.memory import footprint
from realign.training.run import train


def test_the_memory_estimate_equals_a_count_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 500, bias=False))
    model[0].weight.requires_grad_(False)
    assert footprint(model.to(torch.bfloat16)) == (
        "full fine-tuning: 500,000 of 1,500,000 parameters train in bfloat16; weights 3.0 MB + "
        "gradients 1.0 MB + optimizer state 2.0 MB = about 6.0 MB before activations"
    )


def test_a_7b_model_in_float32_has_the_expected_memory_estimate() -> None:
    with torch.device("meta"):
        model = nn.Linear(70_000, 100_000, bias=False)
    assert footprint(model).endswith(
        "weights 28.0 GB + gradients 28.0 GB + optimizer state 56.0 GB = about 112.0 GB before "
        "activations"
    )


def test_training_reports_its_memory_once(tmp_path: Path, model_dir, records, capsys) -> None:
    write_parquet(records(2), tmp_path / "d.parquet")
    lora = LoraSection(r=2, alpha=4)
    for name, options in (("full fine-tuning", {}), ("LoRA", {"lora": lora})):
        out = tmp_path / name
        train(
            TrainConfig(
                model=str(model_dir), data=tmp_path / "d.parquet", out=out, batch_size=2, **options
            )
        )
        lines = [line for line in capsys.readouterr().err.splitlines() if "before activ" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"{name}: ")
        assert "parameters train in float32" in lines[0]
