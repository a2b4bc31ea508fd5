"""RdpoTrainer refuses wrong options before a model computes anything, checked by its messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from realign.errors import RefusedError
from realign.integrations.trl import RdpoTrainer
from realign.modeling.adapters import quiet_peft
from realign_kernels import Objective
from tests.realign.integrations.trl.stock import (
    cached_reference,
    config,
    ours,
    pairs,
    policy_model,
    reference_model,
    stock,
    untied_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


OWN_LOSS = "pass objective= with a table of terms, or use TRL's own DPOTrainer"
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
DPO = {"objective": Objective.dpo()}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"loss_type": "robust"},
            "loss_type must be one of sigmoid, hinge, ipo, got ['robust']. Choose one of them, "
            + OWN_LOSS,
        ),
        ({"loss_type": ["sigmoid", "sft"]}, "ipo, got ['sigmoid', 'sft']. Choose one of them"),
        (
            {"f_divergence_type": "js_divergence"},
            f"f_divergence_type must be 'reverse_kl', got 'js_divergence'. Drop it, {OWN_LOSS}.",
        ),
        ({"ld_alpha": 0.5}, "ld_alpha must be None, got 0.5. Drop it, or use TRL's own"),
        ({"use_weighting": True}, "use_weighting must be False, got True. Drop it"),
        ({"loss_weights": [2.0]}, "loss_weights must be None, got [2.0]. Pass image_weight="),
        ({"padding_free": True}, "padding_free must be False, got True. Drop it: shared_prefix="),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of must be None, got 8. Drop it"),
        (
            {"precompute_ref_log_probs": True},
            "precompute_ref_log_probs must be False, got True. Pass reference=; `realign cache`",
        ),
    ],
)
@pytest.mark.parametrize("data_path", ["own", "native"])
def test_incompatible_configuration_options_are_refused(
    tmp_path: Path, training: dict[str, Any], message: str, data_path: str
) -> None:
    with pytest.raises(RefusedError, match=re.escape(message)):
        ours(tmp_path, model=None, data_path=data_path, training=training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_path": "trl"}, "data_path must be one of own, native, got 'trl'. Choose own"),
        (
            {"reference": {}, "training": {"sync_ref_model": True}},
            "sync_ref_model must be False beside reference=, got True. Leave reference= out",
        ),
        (
            {"reference": {}},
            "reference must have every row, lacks 4 of 4, first: train_dataset, row 1 (counting "
            "from 1). Run `realign cache` for this dataset",
        ),
        (
            {"reference": [1.0]},
            "reference must map record.key to log-probabilities, got list. Pass what read_cache",
        ),
        (
            {"reference": {}, "ref_model": "a model"},
            "ref_model must be None beside reference=, got str: ",
        ),
        (
            {"reference": {}, "data_path": "native"},
            "reference must be left out with data_path='native', got {}. Drop it, or pass data_pat",
        ),
        (
            {"shared_prefix": True, "data_path": "native"},
            "shared_prefix must be left out with data_path='native', got True",
        ),
        (
            {"data_collator": len},
            "data_collator must be left out with data_path='own', got <built-in function len>. "
            "Drop it, or pass data_path='native'",
        ),
        ({"compute_metrics": len}, "compute_metrics must be left out with data_path='own'"),
        ({**DPO, "image_weight": 2.0}, "image_weight must be left out beside objective=, got 2.0"),
        ({**DPO, "image_beta": 2.0}, "image_beta must be left out beside objective=, got 2.0"),
        ({**DPO, "training": {"beta": 0.3}}, "beta must be left out beside objective=, got 0.3"),
        (
            {**DPO, "training": {"loss_type": "ipo"}},
            "loss_type must be left out beside objective=, got ['ipo']. Put it into the terms",
        ),
        (
            {"peft_config": PROMPT},
            "peft_config must not add virtual tokens with data_path='own', got PromptTuningConfig. "
            "Pass data_path='native'",
        ),
    ],
)
def test_incompatible_arguments_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=re.escape(message)):
        ours(tmp_path, **{"model": None, **options})


@pytest.mark.parametrize("data_path", ["own", "native"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_without_retrieved_images_is_refused(
    tmp_path: Path, data_path: str, stream: bool
) -> None:
    dataset = pairs(4).remove_columns("rejected_images")
    if stream:
        dataset = dataset.to_iterable_dataset()
    for options in (
        {"train_dataset": dataset},
        {"eval_dataset": {"a": dataset}},
    ):
        with pytest.raises(
            RefusedError,
            match=r"must have the column rejected_images.*got the columns images, prompt",
        ):
            ours(tmp_path, model=None, data_path=data_path, **options)  # fmt: skip
    trainer = ours(tmp_path, data_path=data_path, train_dataset=dataset, objective=Objective.dpo())
    assert trainer.objective.num_cells == 2


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_a_dataset_without_images_is_refused(tmp_path: Path, data_path: str) -> None:
    """TRL would treat such a dataset as text and change its answers."""
    dataset = pairs(4).remove_columns("images")
    options = {"data_path": data_path, "train_dataset": dataset, "objective": Objective.dpo()}
    with pytest.raises(RefusedError, match="train_dataset must have the column images, the image"):
        ours(tmp_path, model=None, **options)


def test_a_reference_cache_of_fewer_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"reference must have 4 values per row, got shape \(3,\)"
    ):
        ours(tmp_path, model=None, reference=cached_reference(), objective=Objective.symmetric())


def test_the_native_path_refuses_a_row_with_too_few_retrieved_images(tmp_path: Path) -> None:
    trainer = ours(tmp_path, data_path="native")
    row = {**pairs(1)[0], "rejected_images": []}
    with pytest.raises(RefusedError, match=r"rejected_images must be as many .* got 0 for 1"):
        trainer.data_collator([row])


def test_a_model_already_given_to_a_trl_trainer_is_refused(tmp_path: Path) -> None:
    model = stock(tmp_path).model
    message = "model must not have been given to a trainer of TRL before, .*Load the model again"
    with pytest.raises(RefusedError, match=message):
        ours(tmp_path, model=model)
    assert ours(tmp_path, model=model, data_path="native")


def test_a_model_the_own_path_cannot_score_is_refused_with_the_native_path(
    tmp_path: Path, shifted_logits
) -> None:
    with pytest.raises(RefusedError, match="own forward may take it"):
        ours(tmp_path, model=policy_model())


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_an_adapter_of_the_output_projection_that_is_not_plain_lora_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], **change)
    with quiet_peft(), pytest.raises(RefusedError, match="must be one plain LoRA without dropout"):
        ours(
            tmp_path,
            model=untied_model(),
            peft_config=lora,
            training={"disable_dropout": False},
        )


def test_an_adapter_of_the_output_projection_on_the_native_path_is_refused_by_trl(
    tmp_path: Path,
) -> None:
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    with quiet_peft(), pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head`"):
        ours(tmp_path, model=untied_model(), data_path="native", peft_config=lora)


def test_a_model_with_prompt_tuning_is_refused(tmp_path: Path) -> None:
    model = reference_model()
    model.config.vocab_size = model.config.text_config.vocab_size
    with quiet_peft(), pytest.raises(RefusedError, match="must not add virtual tokens"):
        ours(tmp_path, model=get_peft_model(model, PROMPT), peft_config=None)


def test_evaluation_outputs_beyond_the_loss_are_refused(tmp_path: Path) -> None:
    trainer = ours(tmp_path, reference=cached_reference())
    with pytest.raises(RefusedError, match=r"prediction_loss_only must be True .* Call evaluate"):
        trainer.predict(trainer.train_dataset)


def test_a_streamed_row_missing_from_the_reference_is_refused(tmp_path: Path) -> None:
    stream = pairs(4, 9).to_iterable_dataset()
    trainer = ours(tmp_path, train_dataset=stream, reference=cached_reference())
    with pytest.raises(RefusedError, match="reference must have every row, lacks row with prompt"):
        trainer.train()


def test_rows_given_to_evaluate_are_checked(tmp_path: Path) -> None:
    trainer = ours(tmp_path, reference=cached_reference())
    assert trainer.evaluate(pairs(4))["eval_loss"] > 0
    with pytest.raises(RefusedError, match="lacks 2 of 2, first: eval_dataset, row 1"):
        trainer.evaluate(pairs(2, 9))


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_label_smoothing_is_ignored_as_by_trl(tmp_path: Path, caplog, data_path: str) -> None:
    trainer = ours(tmp_path, data_path=data_path, training={"label_smoothing": 0.1})
    assert trainer.objective == Objective.rdpo(0.1)
    assert "label_smoothing = 0.1 is ignored: TRL reads it for" in caplog.text


def test_a_policy_that_differs_from_its_cache_is_reported_once(tmp_path: Path, caplog) -> None:
    warning = "the first loss must be 1.386294, that of a policy which equals its reference"
    options = {"reference": cached_reference(), "training": {"max_steps": 2}}
    ours(tmp_path, model=reference_model(), **options).train()
    assert warning not in caplog.text
    ours(tmp_path, model=policy_model(), **options).train()
    assert caplog.text.count(warning) == 1
    assert "Go on only if the policy is meant to begin elsewhere." in caplog.text
    assert "check_first_step" not in caplog.text


def test_max_length_and_remove_unused_columns_are_reset_and_reported(
    tmp_path: Path, caplog
) -> None:
    trainer = ours(tmp_path, training={"max_length": 20, "remove_unused_columns": True})
    assert trainer.args.max_length is None
    assert not trainer.args.remove_unused_columns
    assert "max_length is set to None, it was 20" in caplog.text
    assert "remove_unused_columns is set to False" in caplog.text


def test_datasets_that_trl_refuses_raise_the_errors_of_trl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        RdpoTrainer(policy_model(), args=config(tmp_path))
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
        ours(tmp_path, train_dataset=[pairs(1)[0]])
