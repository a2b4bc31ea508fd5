"""The reference training script trains."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realign.data.formats.parquet import write_parquet
from realign.modeling.loading import load_model

SCRIPT = Path(__file__).parents[2] / "examples" / "train_rdpo.py"


@pytest.mark.full
def test_the_training_script_trains_an_adapter_on_the_embedded_model(
    tmp_path: Path, model_dir, records
) -> None:
    write_parquet(records(16), tmp_path / "d.parquet")
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--model", model_dir, "--data", tmp_path / "d.parquet", "--out", tmp_path / "run"]
    options = ["--rank", "4", "--learning-rate", "1e-3", "--epochs", "2"]
    checkpoint = main([*map(str, arguments), *options])
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert any(t.abs().sum() > 0 for name, t in adapter.items() if "lora_B" in name)
    assert load_model(checkpoint, torch.float32)
    assert (checkpoint / "chat_template.jinja").is_file()


def test_the_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 80
