"""The commands and the Python of docs/guides/trainers/trl.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils
from typer.testing import CliRunner

import realign
from realign.cli import app
from realign.demo.run import MODEL
from realign.integrations.trl import patch as patching
from tests.realign.integrations.trl.head_calls import files_of_trl
from tests.realign.integrations.trl.stock import ours, pairs

PAGE = (Path(__file__).parents[4] / "docs/guides/trainers/trl.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page_finds_the_reference_cache_of_the_policy(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs().to_parquet("dataset.parquet")
    section = PAGE.split("### The reference")[1].split("### ")[0].replace("MODEL", str(MODEL))
    (command,) = re.findall(r"^realign (cache .*)$", section, re.MULTILINE)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"realign": realign, "Path": Path, "torch": torch}
    exec(block, names)
    trainer = ours(
        tmp_path,
        model=AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.bfloat16),
        processing_class=AutoProcessor.from_pretrained(MODEL),
        reference=names["reference"],
        training={"bf16": True},
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1.386294, abs=1e-3)
    assert "the first loss must be" not in caplog.text


def test_the_page_names_the_trainers_that_call_the_function():
    callers = {Path(name).stem for name in files_of_trl("fused_lm_head=True")}
    names = ["dpo", "kto", "sft", "grpo", "rloo", "async_grpo"]
    assert callers == {"utils", *(f"{name}_trainer" for name in names)}
    assert "DPO, KTO, SFT, GRPO, RLOO; of the experimental ones the asynchronous GRPO" in PAGE


def test_the_code_block_of_the_page_patches_trl():
    section = PAGE.split("## Exact log-probabilities in TRL's trainers")[1]
    (block, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(block, {})
    assert utils._ChunkedLogProbFunction is not ChunkedLogProbFunction
    (patch,) = patching._patches
    patch.undo()
