"""Loading a model: whole safetensors weights or a refusal; an identity that sees every byte."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from realign.config import LoraSection, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.folder import model_identity
from realign.modeling.loading import load_model
from realign.modeling.processors import load_processor
from realign.training.run import train


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_missing_weight_is_refused_by_name(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"must hold every weight, lacks 1, first: .*up_proj"):
        load_model(copy, torch.float32)


def test_weights_in_a_pickle_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="must hold safetensors weights, got none"):
        load_model(copy, torch.float32)


def test_damaged_weights_are_refused(copy: Path) -> None:
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[:1000])
    with pytest.raises(
        RefusedError, match=r"must hold whole files .*, got SafetensorError: Error while"
    ):
        load_model(copy, torch.float32)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
BAD_CONFIGS = {
    "text only": (
        json.dumps(LLAMA),
        "must be that of a vision-language model, got the type 'llama",
    ),
    "unknown": (
        '{"model_type": "nosuch"}',
        "config.json must be a configuration .* got ValueError",
    ),
    "cut off": ('{"model_type": ', "config.json must be a configuration .* got "),
    "wrong type": (
        json.dumps(LLAMA | {"hidden_size": "abc"}),
        "config.json must be a configuration .* got StrictDataclass",
    ),
    "wrong dtype": (
        json.dumps(LLAMA | {"dtype": "float99"}),
        "config.json must be a configuration .* got AttributeError",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("load", [load_processor, lambda folder: load_model(folder, torch.float32)])
def test_other_model_types_and_damaged_configurations_are_refused(
    case: str, load, copy: Path
) -> None:
    content, message = BAD_CONFIGS[case]
    (copy / "config.json").write_text(content)
    with pytest.raises(RefusedError, match=message):
        load(copy)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json"])
def test_a_damaged_processor_is_refused(file: str, copy: Path) -> None:
    (copy / file).write_text("[]")
    with pytest.raises(RefusedError, match="must hold the processor of a vision-language model"):
        load_processor(copy)


@pytest.mark.parametrize("content", ['{"weight_map": ', "{}"])
def test_a_damaged_index_of_weights_is_refused(content: str, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(RefusedError, match="must hold whole files that its library loads"):
        load_model(copy, torch.float32)


def test_a_system_error_is_not_reported_as_a_damaged_model(copy: Path, monkeypatch) -> None:
    def open_too_many(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", open_too_many)
    with pytest.raises(OSError, match="Too many open files"):
        load_model(copy, torch.float32)


def test_a_folder_without_a_processor_is_refused(copy: Path) -> None:
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (copy / name).unlink()
    with pytest.raises(RefusedError, match="must hold the processor of a vision-language model"):
        load_processor(copy)


def test_a_folder_with_only_a_tokenizer_is_refused(copy: Path) -> None:
    (copy / "processor_config.json").unlink()
    with pytest.raises(RefusedError, match=r"must hold (a|the) processor of .* Download the model"):
        load_processor(copy)


def test_identity_changes_with_any_byte_of_the_weights(copy: Path) -> None:
    before = model_identity(copy)
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    after = model_identity(copy)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_generation_settings_are_part_of_the_generating_identity_only(copy: Path) -> None:
    before = model_identity(copy), model_identity(copy, generates=True)
    (copy / "generation_config.json").write_text("{}")
    assert model_identity(copy) == before[0]
    assert model_identity(copy, generates=True) != before[1]


def test_lora_on_an_adapter_is_refused(tmp_path: Path, model_dir: Path, records) -> None:
    write_parquet(records(2), tmp_path / "d.parquet")
    options = {"data": tmp_path / "d.parquet", "lora": LoraSection(r=2, alpha=4), "batch_size": 2}
    first = train(TrainConfig(model=str(model_dir), out=tmp_path / "a", **options))
    with pytest.raises(RefusedError, match=r"train\.lora must not be set when .* is an adapter"):
        train(TrainConfig(model=str(first), out=tmp_path / "b", **options))
    assert not (tmp_path / "b").exists()


def test_an_adapter_records_its_base_as_given_by_the_user(
    tmp_path: Path, model_dir: Path, records, monkeypatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(model_dir))
    write_parquet(records(2), tmp_path / "d.parquet")
    options = {"data": tmp_path / "d.parquet", "batch_size": 2}
    lora = LoraSection(r=2, alpha=4)
    first = train(TrainConfig(model="org/vlm", out=tmp_path / "a", lora=lora, **options))
    second = train(TrainConfig(model=str(first), out=tmp_path / "b", **options))  # trained on
    for adapter in (first, second):
        stored = json.loads((adapter / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == "org/vlm"
        assert not (adapter / "README.md").exists()  # peft's form; `realign card` writes a card
        assert load_model(adapter, torch.float32)


def test_an_adapter_on_a_local_base_loads_from_any_directory(
    tmp_path: Path, copy: Path, records, monkeypatch
) -> None:
    write_parquet(records(2), tmp_path / "d.parquet")
    monkeypatch.chdir(tmp_path)
    lora = LoraSection(r=2, alpha=4)
    options = {"data": tmp_path / "d.parquet", "lora": lora, "batch_size": 2}
    adapter = train(TrainConfig(model="model", out=tmp_path / "a", **options))
    monkeypatch.chdir(tmp_path / "a")
    assert load_model(adapter, torch.float32)
    copy.rename(tmp_path / "moved")
    message = (
        rf"adapter {adapter} requires its base model, got '{copy}', which was not found\. "
        rf"Set base_model_name_or_path in {adapter / 'adapter_config.json'} to"
    )
    for use in (model_identity, lambda folder: load_model(folder, torch.float32)):
        with pytest.raises(RefusedError, match=message):
            use(adapter)
        with pytest.raises(RefusedError) as refused:
            use(adapter)
        assert str(refused.value).endswith("which does not exist.")  # --model is not at fault
