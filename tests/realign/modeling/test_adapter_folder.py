"""Adapters in folders: every tensor is the model's, or nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from realign.cli import app
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling import loading
from realign.modeling.adapter_folder import WEIGHTS, check_adapter
from realign.modeling.adapters import quiet_peft
from realign.modeling.loading import load_model
from realign.modeling.merge import merge
from tests.realign.modeling.families.registry import FAMILIES

# what peft says of kinds of adapters when one is made
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        "Model has .tie_word",
        ".lora_bias=True",
        "Setting .save_emb",
        "Adapter 'default':",
        "Sparse invariant checks",
    )
]
Weights = dict[str, Tensor]
LAYERS = ["q_proj", "v_proj", "fc1", "linear_1"]
LORA = {"r": 2, "lora_alpha": 4}
FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def save(folder: Path, base: Path, config: Any) -> Any:
    """Write an adapter whose weights all matter; return the model that has it."""
    model = load_model(base, torch.float32, name=str(base))
    with quiet_peft():
        adapted = get_peft_model(model, config)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture
def good(tmp_path: Path, model_dir: Path) -> Path:
    """An adapter on the embedded model, with its projector's second layer in full."""
    save(
        tmp_path / "good",
        model_dir,
        LoraConfig(**LORA, target_modules=LAYERS, modules_to_save=["linear_2"]),
    )
    return tmp_path / "good"


def with_weights(good: Path, change: Callable[[Weights], Weights]) -> Path:
    weights = change(load_file(good / WEIGHTS))
    copy = Path(shutil.copytree(good, good.with_name("changed")))
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


def with_config(good: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(good, good.with_name("changed")))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


def logits(model: Any) -> Tensor:
    inputs = {"input_ids": torch.arange(5, 25)[None], "attention_mask": torch.ones(1, 20).long()}
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 16}},
        {"bias": "all"},
        {"lora_bias": True},
        {"target_modules": [*LAYERS, "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "multi_modal_projector"]},
        {"trainable_token_indices": {"embed_tokens": [7, 8]}},
        {"init_lora_weights": "pissa"},
        {"task_type": "CAUSAL_LM"},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_adapters_written_by_peft_are_loaded_completely(
    tmp_path: Path, model_dir: Path, options: dict[str, Any]
) -> None:
    adapted = save(
        tmp_path / "a", model_dir, LoraConfig(**{**LORA, "target_modules": LAYERS, **options})
    )
    check_adapter(tmp_path / "a")
    loaded = load_model(tmp_path / "a", torch.float32)
    assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        # its halves are parameters, not layers
        AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
        # these read values of the layers, or make some, when they are put on a model
        ShiraConfig(r=2, target_modules=["q_proj"]),
        VeraConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type,
)
def test_other_adapter_types_are_loaded_completely(
    tmp_path: Path, model_dir: Path, config: PeftConfig
) -> None:
    adapted = save(tmp_path / "a", model_dir, config)
    assert torch.equal(logits(load_model(tmp_path / "a", torch.float32)), logits(adapted))


@pytest.mark.parametrize("mapping", [[], ["LlavaModel"], {}, {"base_model_class": None}])
def test_a_class_mapping_without_the_base_is_accepted(good: Path, mapping: Any) -> None:
    check_adapter(with_config(good, auto_mapping=mapping))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda all_: {name: all_[name] for name in all_ if ".layers.0." in name},
            r"got 34 missing, first: .*layers\.1\.self_attn\.q_proj\.lora_A\.weight\.",
        ),
        (lambda _: {}, "got 44 missing, first: "),
        (
            lambda all_: {**all_, "base_model.model.other.lora_A.weight": torch.zeros(2, 2)},
            r"got 1 unexpected, first: base_model\.model\.other\.lora_A\.weight\.",
        ),
        (
            lambda all_: {"x" + name: all_[name] for name in all_},
            "got 44 missing, first: base_model.*; 44 unexpected, first: xbase_model",
        ),
        (
            lambda all_: {**all_, FIRST: torch.zeros(3, 128)},
            rf"got 1 of another shape, first: {FIRST}, \(3, 128\) instead of \(2, 128\)\.",
        ),
        (
            lambda all_: {**all_, FIRST: torch.zeros(2)},
            rf"got 1 of another shape, first: {FIRST}, \(2,\) instead of \(2, 128\)\.",
        ),
        (  # one tensor under the names of two releases: which of them was trained is not known
            lambda all_: {
                **all_,
                FIRST.replace("model.language_model", "language_model.model"): all_[FIRST].clone(),
            },
            "got 1 unexpected, first: base_model.model.language_model.model.layers.0",
        ),
        (
            lambda all_: {**all_, FIRST: torch.full((2, 128), torch.nan)},
            f"finite weights, got NaN or infinity in {FIRST}",
        ),
        (
            lambda all_: {**all_, FIRST: torch.full((2, 128), -torch.inf)},
            f"finite weights, got NaN or infinity in {FIRST}",
        ),
    ],
    ids=["half", "none", "extra", "renamed", "rank", "dimensions", "twice", "nan", "infinity"],
)
def test_unexpected_adapter_weights_are_refused_by_name(
    good: Path, change: Callable[[Weights], Weights], reason: str, monkeypatch
) -> None:
    changed = with_weights(good, change)
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", None)  # not reached
    with pytest.raises(
        RefusedError,
        match=rf"^adapter {re.escape(str(changed))} must hold (every weight .*)?{reason}",
    ):
        load_model(changed, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_loaded_as_by_peft(good: Path, dtype: torch.dtype) -> None:
    rounded = with_weights(good, lambda all_: {name: all_[name].to(dtype) for name in all_})
    weights = load_file(rounded / WEIGHTS)
    loaded = load_model(rounded, torch.float32).state_dict()
    name = FIRST.replace(".weight", ".default.weight")
    assert torch.equal(loaded[name], weights[FIRST].float())
    assert loaded[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_weights_that_are_not_floats_are_refused(good: Path, dtype: torch.dtype) -> None:
    changed = with_weights(good, lambda all_: {**all_, FIRST: all_[FIRST].to(dtype)})
    message = rf"must hold weights of 16, 32 or 64 bits, got {dtype} in {FIRST}\. Convert"
    with pytest.raises(RefusedError, match=message):
        check_adapter(changed)


# peft 0.20 says nothing of them
UNMATCHED = [
    (
        {"alpha_pattern": {"language_model.model.layers.0.self_attn.q_proj": 9}},
        r"must fit its base .*, got The following alpha_pattern keys did not match any",
    )
][: Version(peft.__version__) >= Version("0.21")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "must name the adapter's base in .*, got None"),
        ({"target_modules": ["nothing"]}, "must fit its base .*, got No modules were targeted"),
        ({"r": 8}, r"got 42 of another shape, first: .*\(2, 128\) instead of \(8, 128\)"),
        ({"r": 0}, "got `r` should be a positive integer value"),
        ({"peft_type": "OTHER"}, "must be the configuration of an adapter of peft, got 'OTHER'"),
        *UNMATCHED,
        (
            {"auto_mapping": {"base_model_class": "LlavaNextForConditionalGeneration"}},
            "must name a base of the class LlavaNextForConditionalGeneration, on which the adapter "
            "was trained, got .*, a LlavaForConditionalGeneration",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_configuration_that_does_not_fit_is_refused(good: Path, changes, message: str) -> None:
    changed = with_config(good, **changes)
    with pytest.raises(RefusedError, match=message):
        load_model(changed, torch.float32)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, good: Path) -> None:
    for name, message in (
        ("llava-1.5", "unexpected, first: .*layers.2.* of another shape"),
        ("qwen2.5-vl", "must name a base of the class LlavaForConditionalGeneration"),
    ):
        base = FAMILIES[name]().save(tmp_path / name)
        changed = with_config(good, base_model_name_or_path=str(base))
        with pytest.raises(RefusedError, match=message):
            check_adapter(changed)
        shutil.rmtree(changed)
    changed = with_config(good, base_model_name_or_path=str(good))
    with pytest.raises(
        RefusedError, match=r"must have a whole model as its base, got .*, an adapter"
    ):
        load_model(changed, torch.float32)


def test_files_that_are_not_read_are_refused(good: Path) -> None:
    (good / "non_lora_trainables.bin").write_bytes(b"a pickle")
    with pytest.raises(RefusedError, match="beside it, a pickle, which is not read"):
        check_adapter(good)
    (good / "non_lora_trainables.bin").unlink()
    whole = (good / WEIGHTS).read_bytes()
    (good / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RefusedError, match=rf"{WEIGHTS} must be a whole safetensors file, got"):
        check_adapter(good)
    (good / WEIGHTS).rename(good / "adapter_model.bin")
    with pytest.raises(RefusedError, match=rf"must hold {WEIGHTS}, got none; a pickle is not read"):
        check_adapter(good)
    (good / "adapter_config.json").write_text("{")
    with pytest.raises(RefusedError, match=r"adapter_config.json, line 1 must be JSON"):
        check_adapter(good)


def test_a_prompt_tuning_adapter_is_refused(tmp_path: Path, model_dir: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with quiet_peft():
        get_peft_model(load_model(model_dir, torch.float32, name=str(model_dir)), config)
    config.base_model_name_or_path = str(model_dir)
    config.save_pretrained(tmp_path / "prompt")
    with pytest.raises(RefusedError, match="must adapt the layers of a model, got the type PROMPT"):
        check_adapter(tmp_path / "prompt")


# parts of names: in releases before 4.52, and from 4.52 to 4.57
BEFORE_452 = {
    "model.model.language_model.": "model.language_model.model.",
    "model.model.vision_tower.": "model.vision_tower.vision_model.",
    "model.model.multi_modal_projector.": "model.multi_modal_projector.",
    "model.lm_head.": "model.language_model.lm_head.",
}
BEFORE_5 = {"model.model.vision_tower.": "model.model.vision_tower.vision_model."}


@pytest.mark.parametrize("older", [BEFORE_452, BEFORE_5, {"base_model.model.": ""}])
def test_parameter_names_of_earlier_releases_are_converted(
    tmp_path: Path, model_dir: Path, older: dict[str, str]
) -> None:
    config = LoraConfig(
        **LORA,
        target_modules=[*LAYERS, "lm_head"],
        modules_to_save=["linear_2"],
        exclude_modules=[],
    )
    adapted = save(tmp_path / "good", model_dir, config)

    def rename(weights: Weights) -> Weights:
        renamed = {}
        for name, weight in weights.items():
            part = next((part for part in older if part in name), "")
            renamed[name.replace(part, older[part], 1) if part else name] = weight
        assert renamed.keys() != weights.keys()
        return renamed

    loaded = load_model(with_weights(tmp_path / "good", rename), torch.float32)
    expected = adapted.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_every_command_refuses_a_bad_adapter_before_it_writes(
    tmp_path: Path, good: Path, records, monkeypatch
) -> None:
    half = with_weights(good, lambda all_: {FIRST: all_[FIRST]})
    monkeypatch.chdir(tmp_path)
    rows = records(2)
    write_parquet(rows, Path("d.parquet"))
    Path("images").mkdir()
    Path("data").mkdir()
    Path("images/0.png").write_bytes(rows[0].images[0])
    question = {"image": "0.png", "text": "Is there a house?", "label": "no"}
    Path("data/pope_random.jsonl").write_text(json.dumps(question) + "\n")
    before = {*tmp_path.rglob("*")}
    for command in (
        ["merge", "--model", half],
        ["check", "--model", half, "--data", "d.parquet"],
        ["cache", "--model", half, "--data", "d.parquet"],
        ["train", "--model", half, "--data", "d.parquet"],
        ["train", "--model", half, "--data", "d.parquet", "--dry-run"],
        ["build", "--model", half, "--source", "d.parquet"],
        ["eval", "--model", f"half={half}", "--data", "data", "--images", "images"],
    ):
        result = CliRunner().invoke(app, [*map(str, command), "--out", "out"])
        assert result.exit_code == 2, (command, result.output)
        assert "must hold every weight of its layers on" in result.output, command
        assert "got 43 missing, first: base_model" in result.output
        assert {*tmp_path.rglob("*")} == before, command


@pytest.mark.parametrize(("name", "layer"), [("embedding", "embed_tokens"), ("head", "lm_head")])
def test_layers_that_share_a_weight_are_not_merged(
    tmp_path: Path, model_dir: Path, name: str, layer: str
) -> None:
    save(tmp_path / name, model_dir, LoraConfig(**LORA, target_modules=[layer]))
    with pytest.raises(RefusedError, match=f"share one weight .* got an adapted {name}"):
        merge(str(tmp_path / name), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_peft_cannot_merge_is_refused(tmp_path: Path, model_dir: Path) -> None:
    save(tmp_path / "a", model_dir, LoraConfig(**LORA, target_modules=LAYERS, lora_bias=True))
    with pytest.raises(RefusedError, match="must be of a kind that can be merged, got Impossible"):
        merge(str(tmp_path / "a"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
