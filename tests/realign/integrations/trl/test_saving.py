"""RdpoTrainer saves the trained weights: checkpoints resume, adapters load and get cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from realign.demo.run import MODEL
from realign.errors import RefusedError
from realign.modeling.adapters import quiet_peft
from realign.review.cards.card import write_card
from realign.review.cards.licence import Licence
from realign.review.cards.model_card import CardOptions
from realign.review.cards.push import prepare
from tests.realign.integrations.trl.stock import (
    cached_reference,
    lora,
    ours,
    pairs,
    reference_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0.0, msg=name)


RESUMED = {
    "per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2
}  # fmt: skip


def test_a_full_model_is_saved_and_resumed(tmp_path: Path, caplog) -> None:
    options: dict[str, Any] = {"train_dataset": pairs(8), "reference": cached_reference(8)}
    training = RESUMED
    whole = ours(tmp_path / "whole", **options, training=training)
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(weights(saved), weights(whole.model))
    resumed = ours(tmp_path / "resumed", **options, training=training)
    caplog.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert "the first loss must be" not in caplog.text  # of a policy that has been trained
    assert resumed.state.global_step == 4
    assert_same(weights(resumed.model), weights(whole.model))
    lines = [[line for line in run.state.log_history if "loss" in line] for run in (resumed, whole)]
    assert lines[0][-1]["loss"] == lines[1][-1]["loss"]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "2502.13146" in card
    assert "rDPO" in card


def test_training_of_an_adapter_is_resumed(tmp_path: Path) -> None:
    training = {**RESUMED, "per_device_train_batch_size": 1}
    runs = []
    for name, start in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        with quiet_peft():
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
            options = {"model": reference_model(), "peft_config": config}
            run = ours(tmp_path / name, **options, training=training)
            run.train(resume_from_checkpoint=start and str(start))
        runs.append(weights(run.model))
    assert_same(*runs)
    assert any(value.any() for name, value in runs[0].items() if "lora_B" in name)


@pytest.mark.parametrize("data_path", ["own", pytest.param("native", marks=pytest.mark.full)])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, data_path: str) -> None:
    """At this rate the loss of the second checkpoint is higher than that of the first."""
    training = {
        **RESUMED, "max_steps": 2, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "learning_rate": 3e-2,
    }  # fmt: skip
    trainer = ours(tmp_path, data_path=data_path, eval_dataset=pairs(4), training=training)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[0] != losses[1]
    best = tmp_path / f"checkpoint-{1 + losses.index(min(losses))}"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = AutoModelForImageTextToText.from_pretrained(best, dtype=torch.float32)
    assert_same(weights(trainer.model), weights(saved))


def test_an_adapter_is_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    with quiet_peft():
        trainer = ours(
            tmp_path,
            model=reference_model(),
            peft_config=lora("q_proj"),
            reference=cached_reference(),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        loaded = PeftModel.from_pretrained(reference_model(), str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(name.startswith("model") for name in files)
    found, expected = loaded.state_dict(), trainer.model.state_dict()
    for name in (name for name in expected if "lora" in name):
        assert torch.equal(found[name], expected[name])


def test_an_adapter_with_a_card_is_pushed_only_without_pickle_files(tmp_path: Path) -> None:
    with quiet_peft():
        trainer = ours(tmp_path, model=reference_model(), peft_config=lora("q_proj"))
        trainer.save_model(str(tmp_path / "saved"))
    folder, licence = tmp_path / "saved", Licence("mit")
    with pytest.raises(RefusedError, match=r"README.md must be as .* Pass --overwrite to replace"):
        write_card(folder, CardOptions(licence))  # that of peft
    card = write_card(folder, CardOptions(licence), overwrite=True).read_text()
    assert "A LoRA adapter for `model` (a local folder)." in card
    assert "The folder of the run that made these weights is not known to this card." in card
    with pytest.raises(RefusedError, match=r"got training_args.bin, a pickle. Move it away"):
        prepare(folder, "user/name")
    (folder / "training_args.bin").unlink()
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(MODEL), "user/base"))
    assert "adapter_model.safetensors" in prepare(folder, "user/name").files
