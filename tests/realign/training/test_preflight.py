"""Faults and requirements of a run are reported before any weight is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from realign.cli import app
from realign.config import CacheConfig, LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.acceleration import quantized_weights
from realign.modeling.memory import Footprint
from realign.training import preflight as module
from realign.training.arguments import num_steps, num_warmup_steps, training_arguments
from realign.training.plan import TrainPlan, accumulation_steps
from realign.training.policy import load_policy, outline_policy
from realign.training.run import train

LORA = LoraSection(r=4, alpha=8)


@pytest.fixture
def data(tmp_path: Path, records) -> Path:
    path = tmp_path / "dataset.parquet"
    write_parquet(records(12), path)
    return path


@pytest.fixture
def without_weights(tmp_path: Path, model_dir: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def config(model: Path, data: Path, tmp_path: Path, **options) -> TrainConfig:
    return TrainConfig(**{"model": str(model), "data": data, "out": tmp_path / "run", **options})


def test_a_dry_run_reports_the_plan_without_weights_and_writes_nothing(
    tmp_path: Path, without_weights: Path, data: Path
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--dry-run", "--model", without_weights, "--data", data, "--out", out]
    arguments += ["--set", "train.batch_size=2", "--set", "train.pairs_per_step=6"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--epochs", "2"])
    assert result.exit_code == 0, result.output
    rows, steps, weights, estimate = result.stderr.splitlines()[-4:]
    assert rows.startswith("12 pairs; sequences of ")
    assert "images of " in rows
    assert steps == "6 pairs per step (2 x 3 accumulated); 4 steps, 0 of them warm-up"
    assert weights.startswith("full fine-tuning: 948,096 of 1,578,240 parameters train in float32")
    assert estimate.startswith("estimate: at most ")
    assert f"checkpoint would be {out / 'checkpoint'}" in result.stdout.replace("\n", "")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoraSection(targets=["q_proj", "typo"])}, "lora.targets .* got 'typo'"),
        (
            {"lora": LoraSection(targets=["q_proj"]), "projector_learning_rate": 2e-5},
            "projector_learning_rate must be set only if the projector trains",
        ),
        ({"report_to": "wanbd"}, r"must name trackers of .*wandb, .*, got 'wanbd'\. Name one"),
        ({"report_to": ["dvclive"]}, r"that are installed, got 'dvclive'\. .*pip install dvclive"),
        ({"attention": "flash"}, "attention: flash requires the package flash-attn"),
        ({"liger": True}, "liger: true requires the package liger-kernel"),
        (
            {"lora": LORA, "quantization": "nf4"},
            "quantization: nf4 requires the package bitsandbytes",
        ),
        ({"max_length": 20}, "12 of 12 rows are longer than max_length = 20 tokens"),
    ],
)
def test_impossible_options_are_refused_before_weights_load(
    tmp_path: Path, without_weights: Path, data: Path, options, message: str, monkeypatch
) -> None:
    monkeypatch.setattr("realign.modeling.acceleration.find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=message):
        train(config(without_weights, data, tmp_path, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["attention", "liger", "quantization"])
def test_a_package_that_requires_a_gpu_is_refused_without_one(
    tmp_path: Path, without_weights: Path, data: Path, option: str, monkeypatch
) -> None:
    monkeypatch.setattr("realign.modeling.acceleration.find_spec", lambda name: object())
    value = {"attention": "flash", "liger": True, "quantization": "nf4"}[option]
    with pytest.raises(RefusedError, match=rf"^{option}: \w+ requires a GPU"):
        train(config(without_weights, data, tmp_path, lora=LORA, **{option: value}))


def test_a_resumed_run_checks_only_the_limits_again(
    tmp_path: Path, model_dir: Path, data: Path, monkeypatch, capsys
) -> None:
    same = config(model_dir, data, tmp_path, batch_size=6, pairs_per_step=6)

    def killed(*_, **__) -> None:
        raise KeyboardInterrupt

    def again() -> str:
        """Return what the same command says until it is killed as its training begins."""
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("realign.training.run.RDPOTrainer.train", killed)
            with pytest.raises(KeyboardInterrupt):
                train(same)
        return capsys.readouterr().err

    run = tmp_path / "run"
    first = again()
    assert "check rows: 12/12" in first
    second = again()
    assert "12 rows were checked before and have not changed; not checked again" in second
    assert "check rows" not in second
    start = "12 pairs; sequences of"
    assert [line for line in first.splitlines() if line.startswith(start)] == [
        line for line in second.splitlines() if line.startswith(start)
    ]
    with pytest.raises(RefusedError, match="12 of 12 rows are longer than max_length = 20 tokens"):
        train(same.model_copy(update={"max_length": 20}))
    train(same)
    shutil.rmtree(run / "checkpoint")
    assert "not checked again" in again()
    file = run / "row_index.json"
    for raw in (file.read_text().replace("1", "2", 1), "[", "[]", '{"rows": [1], "images": []}'):
        file.write_text(raw)
        assert "check rows: 12/12" in again()
        assert "not checked again" in again()
    monkeypatch.setattr("realign.modeling.identity.version_of", lambda name: "99")
    assert "check rows: 12/12" in again()


def test_rows_longer_than_max_position_embeddings_are_refused(
    tmp_path: Path, without_weights: Path, data: Path
) -> None:
    file = without_weights / "config.json"
    raw = json.loads(file.read_text())
    raw["text_config"]["max_position_embeddings"] = 20
    file.write_text(json.dumps(raw))
    with pytest.raises(
        RefusedError, match=r"12 of 12 rows are longer than max_position_embeddings = 20 .*Shorten"
    ):
        train(config(without_weights, data, tmp_path))


def test_a_cache_of_another_processor_is_refused_before_weights_load(
    tmp_path: Path, model_dir: Path, without_weights: Path, data: Path
) -> None:
    from realign.reference.run import cache

    cache(CacheConfig(model=str(model_dir), data=data, out=tmp_path / "cache"))
    file = without_weights / "processor_config.json"
    file.write_text(file.read_text().rstrip() + "\n\n")
    with pytest.raises(RefusedError, match=r"processor_config\.json"):
        train(config(without_weights, data, tmp_path, cache=tmp_path / "cache"))


WITHOUT_LORA: list[dict] = [{}, {"freeze_vision": False, "freeze_language": True}]
WITH_LORA: list[dict] = [
    {"lora": LORA, "dtype": "bfloat16", "train_projector": True},
    {"lora": LoraSection(r=2, alpha=4, targets=["q_proj"]), "freeze_projector": True},
]


@pytest.mark.parametrize(
    ("options", "is_adapted"),
    [*((one, False) for one in WITHOUT_LORA + WITH_LORA), *((one, True) for one in WITH_LORA)],
    ids=str,
)
def test_the_outlined_model_has_the_trained_parameters(
    tmp_path: Path, model_dir: Path, data: Path, options, is_adapted: bool
) -> None:
    folder = model_dir
    if is_adapted:  # an adapter whose training goes on
        made = load_policy(TrainPlan.of(config(model_dir, data, tmp_path, **options)))
        folder = tmp_path / "adapter"
        made.save_pretrained(folder)
        options = {name: value for name, value in options.items() if name == "dtype"}
    run = config(folder, data, tmp_path, **options)
    outline, loaded = outline_policy(TrainPlan.of(run)), load_policy(TrainPlan.of(run))

    def trained(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {n: (p.shape, p.dtype) for n, p in model.named_parameters() if p.requires_grad}

    assert trained(outline) == trained(loaded)
    assert Footprint.of(outline) == Footprint.of(loaded)
    assert {p.device.type for p in outline.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation", "epochs"),
    [(12, 4, 1, 1.0), (12, 5, 2, 2.0), (7, 2, 3, 1.5), (3, 8, 4, 1.0), (9, 2, 2, 3.0)],
)
def test_the_number_of_steps_equals_that_of_the_trainer(
    tmp_path: Path, model_dir: Path, count: int, batch_size: int, accumulation: int, epochs: float
) -> None:
    from transformers import Trainer

    options = {
        "batch_size": batch_size,
        "pairs_per_step": batch_size * accumulation,
        "epochs": epochs,
    }
    run = config(model_dir, tmp_path, tmp_path, warmup_ratio=0.5, **options)
    arguments = training_arguments(run, count)
    trainer = Trainer(nn.Linear(1, 1), arguments, train_dataset=[{"x": 1}] * count)
    loader = trainer.get_train_dataloader()
    # its name among what transformers returns differs by version
    assert num_steps(run, count) in trainer.set_initial_training_values(arguments, loader)
    micro_steps = math.ceil(count / batch_size)
    assert num_steps(run, count) == math.ceil(epochs * math.ceil(micro_steps / accumulation))
    assert arguments.warmup_steps == num_warmup_steps(run, count) == num_steps(run, count) // 2


@pytest.mark.parametrize(
    ("processes", "batch_size", "pairs", "accumulated"),
    [(1, 1, 32, 32), (8, 1, 32, 4), (4, 8, 32, 1), (3, 2, 12, 2)],
)
def test_pairs_per_step_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch, processes, batch_size, pairs, accumulated
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    run = config(tmp_path, tmp_path, tmp_path, batch_size=batch_size, pairs_per_step=pairs)
    assert accumulation_steps(run) == accumulated
    assert num_steps(run, 11_000) == math.ceil(11_000 / pairs)


@pytest.mark.parametrize(
    ("processes", "batch_size", "message"),
    [
        (
            3,
            1,
            r"multiple of 3, which is batch_size 1 x 3 processes, got 32\. Set it to 30 or 33, ",
        ),
        (8, 8, r"multiple of 64, which is batch_size 8 x 8 processes, got 32\. Set it to 64, or"),
    ],
)
def test_pairs_per_step_that_processes_cannot_share_are_refused_before_the_model(
    tmp_path: Path, monkeypatch, processes, batch_size, message
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(RefusedError, match=message):
        TrainPlan.of(config(tmp_path / "no model", tmp_path, tmp_path, batch_size=batch_size))


def test_a_model_beyond_the_memory_is_refused_and_a_tight_fit_is_reported(
    tmp_path: Path, without_weights: Path, data: Path, capsys, monkeypatch
) -> None:
    run = config(without_weights, data, tmp_path, batch_size=2)
    footprint = Footprint.of(outline_policy(TrainPlan.of(run))).total
    monkeypatch.setattr(module, "_device_memory", lambda: ("a toy", footprint - 1))
    with pytest.raises(
        RefusedError, match=r"must fit into 17\.\d MB of a toy, got full .* Use lora"
    ):
        train(run, dry_run=True)
    monkeypatch.setattr(module, "_device_memory", lambda: ("a toy", footprint + 1))
    train(run, dry_run=True)
    advice = "which may be too little: try gradient_checkpointing or a smaller batch_size\n"
    assert capsys.readouterr().err.endswith(advice)
    # weights that are split over processes belong to none alone
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(module, "_device_memory", lambda: ("a toy", 1))
    train(run, dry_run=True)


def test_only_the_language_model_is_quantized_to_four_bits(
    tmp_path: Path, model_dir: Path, data: Path
) -> None:
    run = config(model_dir, data, tmp_path, lora=LORA, dtype="bfloat16", quantization="nf4")
    model = outline_policy(TrainPlan.of(run))
    names = quantized_weights(model)
    parameters = dict(model.named_parameters())
    assert names
    assert names <= parameters.keys()
    assert not [n for n in names if "language_model" not in n or "lora" in n or "lm_head" in n]
    numbers = sum(parameters[name].numel() for name in names)
    saved = Footprint.of(model).weights - Footprint.of(model, names).weights
    assert saved == pytest.approx(numbers * (16 - 4.127) / 8, abs=len(names))
