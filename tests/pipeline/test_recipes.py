"""The training recipes: what they say is what `realign train` takes, and what the paper or its code
has.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from realign.cli import app
from realign.config import TrainConfig
from realign.config_file import load_config
from realign.data.formats.parquet import write_parquet
from realign.modeling.adapters import add_adapter
from realign.modeling.memory import Footprint, size

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = ("paper", "authors-code")


def recipe(name: str) -> TrainConfig:
    return load_config(TrainConfig, RECIPES / f"{name}.yaml", flags={"data": "d", "out": "o"})


@pytest.mark.parametrize("name", TRAINING)
def test_recipes_share_the_settings_on_which_paper_and_code_agree(name: str) -> None:
    config = recipe(name)
    assert (config.model, config.objective) == ("llava-hf/llava-1.5-7b-hf", "rdpo")
    assert (config.beta, config.image_beta, config.image_weight) == (0.1, None, 1.0)
    assert (config.epochs, config.schedule, config.warmup_ratio) == (1.0, "cosine", 0.03)
    assert (config.batch_size, config.pairs_per_step) == (1, 32)
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha) == (128, 256)
    assert config.freeze_vision


def test_recipes_differ_in_the_settings_on_which_paper_and_code_differ() -> None:
    paper, code = recipe("paper"), recipe("authors-code")
    assert paper.lora is not None
    assert code.lora is not None
    assert (paper.learning_rate, code.learning_rate) == (1e-5, 1e-6)
    assert (paper.rejected_scoring, code.rejected_scoring) == ("label", "top_non_label")
    assert paper.lora.targets == "all-linear"
    assert code.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (paper.train_projector, paper.projector_learning_rate) == (True, 2e-5)
    assert (code.freeze_projector, code.projector_learning_rate) == (True, None)


@pytest.mark.parametrize("name", TRAINING)
def test_the_memory_named_in_a_recipe_equals_the_estimate_for_its_model(name: str) -> None:
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008),
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(llava, dtype=torch.bfloat16)
        config = recipe(name)
        assert config.lora is not None
        adapted = add_adapter(
            model,
            rank=config.lora.r,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            freeze_vision=config.freeze_vision,
            freeze_projector=config.freeze_projector,
            train_projector=config.train_projector,
        )
    total = size(Footprint.of(adapted).total)
    text = " ".join((RECIPES / f"{name}.yaml").read_text().replace("#", " ").split())
    assert re.search(rf"optimizer state: {re.escape(total)}", text)


@pytest.mark.parametrize("name", TRAINING)
def test_the_train_command_accepts_the_recipe(
    tmp_path: Path, name: str, model_dir, records
) -> None:
    write_parquet(records(4), tmp_path / "d.parquet")
    arguments = ["train", "--config", RECIPES / f"{name}.yaml", "--model", model_dir]
    arguments += ["--data", tmp_path / "d.parquet", "--out", tmp_path / "run", "--dry-run"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "LoRA: " in result.stderr
