"""The example of rDPO in TRL runs by the command in its first lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realign.modeling.loading import load_model

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_rdpo.py"


@pytest.mark.full
def test_the_trl_example_trains_an_adapter_on_the_embedded_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", result.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] <= 1.39
    assert "eval_rewards/image_margins" in result.stdout
    adapter = tmp_path / "runs" / "trl-rdpo" / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    assert load_model(adapter, torch.float32)


def test_the_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 100
