"""Differences for which a cache is refused, and differences that do not matter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipImageProcessorPil

from realign.config import CacheConfig, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.processors import load_processor
from realign.reference import Scoring, read_cache
from realign.reference.run import cache
from realign.training.run import train
from realign_kernels import describe_backends
from tests.realign.reference.scorings import identity, scoring


def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def mutated(identity: dict[str, Any], leaf: str) -> dict[str, Any]:
    copy = json.loads(json.dumps(identity))
    *folders, name = leaf.split(".") if "files." not in leaf else (
        "semantics", "files", leaf.removeprefix("semantics.files."))  # fmt: skip
    inner = copy
    for folder in folders:
        inner = inner[folder]
    old = inner[name]
    inner[name] = not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else "other"
    return copy


def test_a_difference_in_any_identity_field_is_refused_by_name(
    tmp_path: Path, model_dir, synthetic
) -> None:
    whole = identity(model_dir)
    rows = synthetic.rows(2)
    synthetic.build(rows, tmp_path, identity=whole)
    assert len(read_cache(tmp_path, rows, whole)) == 2
    fields = [leaf for leaf in leaves(whole) if leaf != "schema"]
    assert len(fields) >= 40
    for field in fields:
        with pytest.raises(RefusedError) as refused:
            read_cache(tmp_path, rows, mutated(whole, field))
        assert f"\n  {field}: cached " in str(refused.value), field
        accepts = "Only the numerics differ: --accept-numerics" in str(refused.value)
        assert accepts == field.startswith("numerics."), field


@pytest.fixture
def model_copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_every_file_of_the_model_is_in_the_identity(model_copy: Path) -> None:
    before = identity(model_copy)
    files = before["semantics"]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "processor_config.json"} <= files.keys()  # fmt: skip
    for name in files:
        path = model_copy / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        after = identity(model_copy)
        assert after["semantics"]["files"].pop(name) != files[name]
        assert after["semantics"]["files"] == {k: v for k, v in files.items() if k != name}
        path.write_bytes(content)
    for name in ("README.md", "generation_config.json"):  # what shapes no log-probability
        (model_copy / name).write_text("{}")
    assert identity(model_copy) == before


def test_an_adapter_and_its_base_are_in_the_identity(tmp_path: Path, model_dir) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model_dir), "peft_type": "LORA"})
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    one = identity(adapter)["semantics"]["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "base/config.json"} <= one.keys()
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    assert identity(adapter)["semantics"]["files"] != one


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cells": 4}, "semantics.cells: 3 4"),
        ({"rejected_scoring": "top_non_label"}, "semantics.rejected_scoring: label top_non_label"),
        ({"dtype": torch.bfloat16}, "numerics.dtype: float32 bfloat16"),
        ({"shared_prefix": False}, "numerics.rows: shared prefix separate"),
        ({"attention": "flash"}, "numerics.attention: sdpa flash"),
        ({"liger": True}, "numerics.liger: False True"),
        ({"quantization": "nf4"}, "numerics.quantization: None nf4"),
        ({"autocast": True}, "numerics.autocast: False True"),
    ],
)
def test_options_that_change_a_value_change_the_identity(
    model_dir, options: dict[str, Any], field: str
) -> None:
    from realign.modeling.identity import differing_fields

    found = differing_fields(identity(model_dir), identity(model_dir, **options))
    assert f"{field}" in [f"{name}: {old} {new}" for name, old, new in found]


def processor_with_other_images(folder: str | Path):
    processor = load_processor(folder)
    processor.image_processor = SiglipImageProcessorPil()
    return processor


BACKENDS = "realign.modeling.identity.describe_backends"
VERSION = "realign.modeling.identity.version"
CUDA = "numerics.accelerator.capability: cached nothing, needed 9.0"
MACHINES = {
    "GPU": ({"torch.cuda.get_device_name": lambda: "H200"}, "numerics.device: cached cpu, needed "),
    "capability": ({"torch.cuda.get_device_capability": lambda: (9, 0)}, CUDA),
    "vectors": ({"torch.backends.cpu.get_cpu_capability": lambda: "SVE"},
                "numerics.accelerator.vectors: cached "),
    "Pillow": ({VERSION: lambda name: "0"}, "numerics.packages.pillow: cached "),
    "peft": ({VERSION: lambda name: "0"}, "numerics.packages.peft: cached "),
    "kernels": ({BACKENDS: lambda: {"auto": "eager on CPUs", "cpu": "not installed"}},
                "numerics.kernel_backend: cached "),
    "products": ({BACKENDS: lambda: describe_backends() | {"cpu": "bfloat16: portable"}},
                 "numerics.accelerator.kernels: cached "),
    "image processor": ({"realign.modeling.identity.load_processor": processor_with_other_images},
                        "numerics.image_processor: cached CLIPImageProcessor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_a_cache_of_another_machine_is_refused_with_the_differences(
    name: str, tmp_path: Path, model_dir, synthetic, monkeypatch
) -> None:
    rows = synthetic.rows(1)
    synthetic.build(rows, tmp_path, identity=identity(model_dir))
    changes, message = MACHINES[name]
    if name in ("GPU", "capability"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
        # a build for GPUs looks at the one that is not there
        monkeypatch.setattr("torch.backends.cudnn.version", lambda: 90000)
    for target, value in changes.items():
        monkeypatch.setattr(target, value)
    needed = identity(model_dir)
    monkeypatch.undo()
    with pytest.raises(RefusedError) as refused:
        read_cache(tmp_path, rows, needed)
    assert message in str(refused.value)


def test_a_cache_of_another_float32_matmul_precision_is_refused(
    tmp_path: Path, model_dir, synthetic
) -> None:
    rows = synthetic.rows(1)
    synthetic.build(rows, tmp_path, identity=identity(model_dir))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(
            RefusedError, match=r"numerics\.float32\.matmul: cached .*, needed tf32"
        ):
            read_cache(tmp_path, rows, identity(model_dir))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_the_layout_of_a_cache_equals_that_of_training(model_dir) -> None:
    from realign.modeling.loading import load_model
    from realign.modeling.packing import choose_layout

    assert scoring(model_dir).model.layout == choose_layout(load_model(model_dir, torch.float32))
    assert scoring(model_dir, shared_prefix=False).model.layout == "separate"


def test_the_most_similar_of_several_caches_is_named(tmp_path: Path, model_dir, synthetic) -> None:
    rows, whole = synthetic.rows(1), identity(model_dir)
    far = mutated(mutated(whole, "semantics.cells"), "semantics.rejected_scoring")
    far["semantics"]["cells"] = 3
    far["semantics"]["scored"] = "all"
    synthetic.build(rows, tmp_path, identity=far)
    synthetic.build(rows, tmp_path, identity=mutated(whole, "numerics.attention"))
    with pytest.raises(RefusedError) as refused:
        read_cache(tmp_path, rows, whole)
    assert "numerics.attention: cached other, needed sdpa" in str(refused.value)
    assert "semantics" not in str(refused.value)


def test_options_that_change_no_value_reuse_the_cache(
    tmp_path: Path, model_dir, records, monkeypatch
) -> None:
    """These options are rates, batch sizes, seeds, epochs, folders, workers and logging."""
    data, root = tmp_path / "data.parquet", tmp_path / "cache"
    write_parquet(records(4), data)
    options = {"model": str(model_dir), "data": data, "out": root}
    place = cache(CacheConfig(**options))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    def refused(self: Scoring):
        raise AssertionError("the reference was computed again")

    monkeypatch.setattr(Scoring, "load", refused)
    for change in ({"batch_size": 1}, {"batch_size": 3, "shard_size": 2}, {"max_length": 4096}):
        assert cache(CacheConfig(**options, **change)) == place
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    for number, change in enumerate(
        [
            {"learning_rate": 3e-4, "warmup_ratio": 0.5, "weight_decay": 0.1, "max_grad_norm": 0},
            {"beta": 0.5, "image_beta": 0.2, "image_weight": 2.0, "nll_weight": 1.0},
            {"batch_size": 3, "pairs_per_step": 6, "epochs": 2, "seed": 7, "logging_steps": 1},
            {"objective": "mdpo", "max_length": 4096, "freeze_vision": False, "save_steps": 1},
        ]
    ):
        run = {**options, "out": tmp_path / str(number), "cache": root}
        train(TrainConfig(**run, **change))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
