"""TRL's own trainers under the patch, against themselves without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from realign.demo.run import MODEL
from realign.integrations.trl import patch_trl
from tests.realign.integrations.trl.stock import (
    QUIET,
    Step,
    distance,
    gradients,
    pairs,
    reference_model,
    step,
    stock,
)

# transformers and trl on each other's names
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def check_equal(found: Step, expected: Step) -> None:
    """Up to rounding in float32."""
    assert abs(found.loss - expected.loss) <= 1e-6
    assert distance(found.gradients, expected.gradients) <= 3e-6
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5, rel=0)
    for name in ("mean_token_accuracy", "num_tokens", "rewards/accuracies"):
        assert found.metrics[name] == expected.metrics[name]


@pytest.fixture
def lora() -> LoraConfig:
    """Return the options of adapters that leave the head alone, as TRL requires."""
    return LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")


@pytest.mark.parametrize("is_made_before", [True, False], ids=["trainer-first", "patch-first"])
@pytest.mark.parametrize("compact", [True, False])
def test_a_patched_dpo_step_equals_the_stock_step(tmp_path: Path, compact, is_made_before) -> None:
    """The policy is off the reference, so that no term of the gradient vanishes."""
    unpatched = stock(tmp_path)
    expected = step(unpatched)
    with patch_trl(compact=compact) as patch:
        trainer = unpatched if is_made_before else stock(tmp_path)
        found = step(trainer)
    assert (patch.calls, patch.passed_on) == (2, 0)  # the policy and the reference
    assert found.loss != pytest.approx(0.6931, abs=1e-3)
    check_equal(found, expected)
    check_equal(step(trainer), expected)  # after the patch: stock again
    assert patch.calls == 2


def test_a_patched_dpo_step_with_adapters_equals_the_stock_step(tmp_path: Path, lora) -> None:
    """The head is frozen, and the reference is the model without its adapters."""
    torch.manual_seed(0)
    trainer = stock(tmp_path, model=reference_model(), ref_model=None, peft_config=lora)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    expected = step(trainer)
    with patch_trl() as patch:
        found = step(trainer)
    assert (patch.calls, patch.passed_on) == (2, 0)
    assert all("lora" in name for name in found.gradients)
    check_equal(found, expected)


def test_a_patched_batch_without_answer_tokens_equals_the_stock_batch(tmp_path: Path) -> None:
    trainer = stock(tmp_path, train_dataset=pairs(2))
    batch = trainer._prepare_inputs(trainer.data_collator([*trainer.train_dataset]))
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    seen = []
    for patching in (False, True):
        trainer.model.zero_grad()
        if patching:
            with patch_trl() as patch:
                loss = trainer.compute_loss(trainer.model, dict(batch))
        else:
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        assert not any(grad.any() for grad in gradients(trainer.model).values())
        seen.append((loss.item(), gradients(trainer.model).keys()))
    assert (patch.calls, patch.passed_on) == (2, 0)
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of one layer, with a head of its own and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("text-model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=484, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1,
        pad_token_id=0, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs between answers."""
    return [float(len(set(text))) for text in completions]


QUESTION = "What is in the image?"
ANSWERS = [
    "There is a red circle.",
    "A blue square is there, and a green star.",
    "Yes.",
    "No, none.",
]
PAIRS = [{"prompt": QUESTION, "completion": f" {text}"} for text in ANSWERS]
PROMPTS = [{"prompt": QUESTION}] * 4
ONLINE = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1}
TRAINERS: dict[str, tuple[type, type, list[dict[str, Any]], dict[str, Any], int]] = {
    "sft": (SFTTrainer, SFTConfig, PAIRS, {}, 1),
    "kto": (
        KTOTrainer,
        KTOConfig,
        [{**row, "label": number % 2 == 0} for number, row in enumerate(PAIRS)],
        {},
        4,
    ),
    # here the entropy is trained on: nothing would say that its gradient is missing
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, {**ONLINE, "entropy_coef": 0.3}, 2),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, ONLINE, 3),
}


class Watch(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Take them."""
        self.gradients = gradients(model)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_patched_step_of_another_trainer_equals_the_stock_step(
    tmp_path: Path, text_model, name
) -> None:
    kind, config, rows, options, calls = TRAINERS[name]
    rewards = {"reward_funcs": reward} if name in ("grpo", "rloo") else {}

    def train() -> tuple[float, dict[str, Tensor]]:
        watch = Watch()
        model = LlamaForCausalLM.from_pretrained(text_model, dtype=torch.float32)
        if name == "kto":  # off its reference
            with torch.no_grad():
                model.lm_head.weight.mul_(3)
        trainer = kind(
            model,
            args=config(
                output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4,
                max_grad_norm=0.0, **QUIET, **options,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            callbacks=[watch],
            **rewards,
        )  # fmt: skip
        trainer.train()
        return trainer.state.log_history[0]["loss"], watch.gradients

    loss_before, expected = train()
    with patch_trl() as patch:
        loss, found = train()
    assert (patch.calls, patch.passed_on) == (calls, 0)
    assert loss == pytest.approx(loss_before, abs=1e-6)
    assert distance(found, expected) <= 3e-6
    assert "lm_head.weight" in found


@pytest.mark.full
def test_fifty_patched_dpo_steps_equal_the_stock_steps(tmp_path: Path) -> None:
    curves: dict[bool, dict[str, Tensor]] = {}
    for patching in (False, True):
        training = {"per_device_train_batch_size": 2, "max_steps": 50}
        training |= {"gradient_checkpointing": True, "lr_scheduler_type": "linear"}
        trainer = stock(tmp_path, train_dataset=pairs(20), training=training)
        train: Callable[[], Any] = trainer.train
        if patching:
            with patch_trl() as patch:
                train()
        else:
            train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        curves[patching] = {
            name: torch.tensor([line[name] for line in lines]).double()
            for name in ("loss", "rewards/margins")
        }
    assert patch.calls == 100
    found, expected = curves[True], curves[False]
    assert len(found["loss"]) == 50
    assert expected["loss"][-10:].mean() < expected["loss"][:10].mean() - 0.1  # it learns
    assert (found["loss"] - expected["loss"]).abs().max() <= 2e-6
    assert (found["rewards/margins"] - expected["rewards/margins"]).abs().max() <= 1e-5
