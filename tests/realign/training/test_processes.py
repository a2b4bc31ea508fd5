"""``realign train`` under torchrun gives the same run as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from realign.config import TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.training.run import train
from realign.training.sharding import check_data_parallel, check_precision, set_up_fsdp

RECIPES = Path(__file__).parents[3] / "recipes" / "accelerate"


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, "-m", "realign", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, model_dir, records) -> None:
    data = tmp_path / "data.parquet"
    write_parquet(records(13), data)
    alone = train(
        TrainConfig(
            model=str(model_dir), data=data, out=tmp_path / "alone", batch_size=8, pairs_per_step=8,
            logging_steps=1, save_steps=1,
        )
    )  # fmt: skip
    out = tmp_path / "together"
    command = [
        "train", "--model", model_dir, "--data", data, "--out", out,
        "--set", "train.batch_size=2", "--set", "train.pairs_per_step=8",
        "--set", "train.logging_steps=1", "--set", "train.save_steps=1",
    ]  # fmt: skip
    result = torchrun(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("checkpoint ->") == result.stderr.count("13 pairs;") == 1
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, alone.parent)
    ]
    assert len(lines[0]) == 2
    for line, expected in zip(*lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    whole, expected_weights = (
        load_file(folder / "checkpoint" / "model.safetensors") for folder in (out, alone.parent)
    )
    assert whole.keys() == expected_weights.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=1e-5, atol=1e-6)
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.parent.iterdir()}

    again = torchrun(*command)
    assert again.returncode == 0, again.stderr
    assert "train:" not in again.stderr
    with pytest.raises(RefusedError, match="processes: stored 2, requested 1"):
        train(
            TrainConfig(
                model=str(model_dir), data=data, out=out, batch_size=2, pairs_per_step=8,
                logging_steps=1, save_steps=1,
            )
        )  # fmt: skip


@pytest.mark.slow
def test_a_refusal_ends_all_processes(tmp_path: Path, model_dir, records) -> None:
    data = tmp_path / "data.parquet"
    write_parquet(records(2), data)
    out = tmp_path / "run"
    result = torchrun(
        "train", "--model", model_dir, "--data", data, "--out", out,
        "--set", "train.max_length=5",
    )  # fmt: skip
    assert result.returncode == 1  # torchrun's own; the processes' is 2
    assert "rank 0: 2 of 2 rows are longer than max_length = 5" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_presets(path: Path) -> None:
    config = load_config_from_file(str(path))
    content = yaml.safe_load(path.read_text())
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == expected
    assert content["mixed_precision"] == ("bf16" if expected == "DEEPSPEED" else "no")


def test_every_engine_has_a_preset() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == {"ddp", "fsdp2", "zero2", "zero3"}


def test_a_mixed_precision_that_differs_from_the_reference_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RefusedError, match=r"must be 'no' .* got bf16.* Set train\.autocast"):
        check_precision(torch.float32, autocast=False)
    check_precision(torch.float32, autocast=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # there it is the dtype of the weights
    check_precision(torch.bfloat16, autocast=False)
    with pytest.raises(RefusedError, match=r"train\.dtype must be bfloat16 under DeepSpeed's bf16"):
        check_precision(torch.float32, autocast=False)


def test_ranks_that_share_a_pair_are_refused() -> None:
    class Accelerator:
        class parallelism_config:
            tp_size, cp_size, sp_size = 1, 2, 1

    with pytest.raises(RefusedError, match=r"cp_size must be 1, got 2"):
        check_data_parallel(Accelerator)


def test_fsdp1_is_refused() -> None:
    class Accelerator:
        class state:
            class fsdp_plugin:
                fsdp_version = 1

    with pytest.raises(RefusedError, match=r"fsdp_version must be 2, got 1\. Set"):
        set_up_fsdp(Accelerator, torch.nn.Linear(1, 1))
