"""RdpoTrainer keeps what DPOTrainer does: loading, adapters, evaluation and collators."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import realign
import realign.integrations.trl
from realign.demo.run import MODEL
from realign.errors import RefusedError
from realign.integrations.trl.native import NativeCollator
from realign.integrations.trl.rows import as_record, with_image_bytes
from realign.modeling.adapters import quiet_peft
from realign.modeling.collate import PreferenceCollator
from realign.modeling.processors import load_processor
from realign_kernels import Objective, preference_loss
from tests.realign.integrations.trl.stock import (
    cached_reference,
    lora,
    ours,
    pairs,
    policy_model,
    reference_model,
    step,
    untied_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapted(model: Any, *targets: str) -> Any:
    torch.manual_seed(3)
    with quiet_peft():
        return get_peft_model(model, lora(*targets))


def test_public_names_are_imported_lazily() -> None:
    names = realign.integrations.trl.__all__
    assert sorted(names) == ["RdpoTrainer", "patch_trl"]
    assert realign.integrations.trl.RdpoTrainer.__name__ == "RdpoTrainer"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realign.integrations.trl.nothing


@pytest.mark.parametrize("missing", ["trl", "trl.models.utils"])
def test_a_missing_or_old_trl_is_refused_with_the_package_to_install(
    monkeypatch, missing: str
) -> None:
    for name in ("native", "own_models", "trainer"):
        monkeypatch.delitem(sys.modules, f"realign.integrations.trl.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RefusedError, match=r"^RdpoTrainer requires trl, .*pip install 'trl>=1.16'"):
        _ = realign.integrations.trl.RdpoTrainer


def test_another_missing_package_raises_its_own_import_error(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "realign.integrations.trl.trainer")
    monkeypatch.setitem(sys.modules, "accelerate.logging", None)
    with pytest.raises(ImportError, match=r"accelerate\.logging"):
        _ = realign.integrations.trl.RdpoTrainer


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_models_are_loaded_by_their_names_as_trl_does(tmp_path: Path, data_path: str) -> None:
    options = {"model": str(MODEL), "ref_model": None, "data_path": data_path}
    trainer = ours(tmp_path, **options)
    assert step(trainer).loss == pytest.approx(2 * math.log(2), abs=1e-6)
    assert trainer.ref_model is not trainer.model


def test_a_cache_replaces_the_reference_model(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", refuse)
    trainer = ours(tmp_path, model=reference_model(), reference=cached_reference())
    assert trainer.ref_model is None
    assert step(trainer).loss == pytest.approx(2 * math.log(2), abs=1e-6)
    assert dpo_trainer.create_model_from_path is refuse  # put back
    assert isinstance(dpo_trainer.BaseTunerLayer, type)


def test_names_of_trl_are_restored_after_a_refusal(tmp_path: Path) -> None:
    before = dpo_trainer.create_model_from_path, dpo_trainer.BaseTunerLayer
    model = policy_model()
    with pytest.raises(ValueError, match="cannot be the same object"):
        ours(tmp_path, model=model, ref_model=model)
    assert (dpo_trainer.create_model_from_path, dpo_trainer.BaseTunerLayer) == before


def test_an_incompatible_trl_version_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(dpo_trainer, "create_model_from_path")
    with pytest.raises(RefusedError, match="trl must be a version whose DPOTrainer uses create_mo"):
        ours(tmp_path)


def dense_loss(model: Any, objective: Objective) -> Tensor:
    """The loss by plain logits of the model and of its base, one row after the other."""
    records = [as_record(row) for row in with_image_bytes(pairs())]
    batch = PreferenceCollator(load_processor(MODEL), 3)(records)
    names = ("input_ids", "attention_mask", "pixel_values")
    inputs = {name: batch[name] for name in names}
    inputs["pixel_values"] = inputs["pixel_values"][list(batch["images"].rows)]

    def logps() -> Tensor:
        tokens = model(**inputs).logits.log_softmax(-1).flatten(0, 1)[batch["answer_index"]]
        tokens = tokens.gather(1, batch["answer_labels"][:, None])[:, 0]
        sums = tokens.new_zeros(12).index_add(0, batch["sequence_ids"], tokens)
        return sums.view(3, 4)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    return preference_loss(logps(), reference, objective).loss


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_of_the_output_projection_trains(tmp_path: Path, task_type: str | None) -> None:
    """The adapter is in the policy's loss and gradient, and not in the reference."""
    config = lora("lm_head", "q_proj")
    config.task_type = task_type
    with quiet_peft():
        trainer = ours(tmp_path, model=untied_model(), peft_config=config)
        found = step(trainer)
        trainer.model.zero_grad()
        expected = dense_loss(trainer.model, trainer.objective)
    assert abs(found.loss - 2 * math.log(2)) > 0.01  # the adapter is no zero
    expected.backward()
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)
    heads = [name for name in found.gradients if "lm_head.lora" in name]
    assert len(heads) == 2
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            off = (found.gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert off < 1e-4, name


def test_an_output_projection_trained_in_full_with_an_adapter_has_gradients(tmp_path: Path) -> None:
    config = lora("q_proj")
    config.modules_to_save = ["lm_head"]
    with quiet_peft():
        trainer = ours(tmp_path, model=untied_model(), peft_config=config)
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight.mul_(1.01)
        found = step(trainer)
        expected = dense_loss(trainer.model, trainer.objective)
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)
    assert any("modules_to_save" in name for name in found.gradients)


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_the_reference_of_a_given_adapter_is_its_initial_state(
    tmp_path: Path, data_path: str
) -> None:
    """TRL's rule: the reference is the adapter as it was given, not the base."""
    with quiet_peft():
        model = adapted(reference_model(), "q_proj", "v_proj")
        trainer = ours(tmp_path, model=model, ref_model=None, data_path=data_path)
        found = step(trainer)
    assert found.loss == pytest.approx(2 * math.log(2), abs=1e-6)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    assert not any(".ref." in name for name in found.gradients)


def test_a_given_adapter_is_not_copied_when_a_cache_is_given(tmp_path: Path) -> None:
    with quiet_peft():
        model = adapted(reference_model(), "q_proj", "v_proj")
        trainer = ours(tmp_path, model=model, reference=cached_reference())
        found = step(trainer)
    assert set(trainer.model.peft_config) == {"default"}
    assert not any(".ref." in name for name in trainer.model.state_dict())
    assert abs(found.loss - 2 * math.log(2)) > 0.01  # the cache is of the base


def test_a_cache_checks_the_tokens_and_pixels_of_the_model_inputs(tmp_path: Path) -> None:
    """The checks of tokens and pixels that `realign train` makes are made here too."""
    pairs().to_parquet(str(tmp_path / "pairs.parquet"))
    records = realign.read_records(tmp_path / "pairs.parquet", None)
    scoring = realign.Scoring(MODEL, 3, "label", realign.Numerics(torch.float32))
    realign.build_cache(records, scoring, tmp_path / "cache")
    reference = realign.read_cache(tmp_path / "cache", records, scoring.identity())
    trainer = ours(tmp_path / "a", model=reference_model(), reference=reference)
    assert step(trainer).loss == pytest.approx(2 * math.log(2), abs=1e-6)
    processor = load_processor(MODEL)
    processor.chat_template = processor.chat_template.replace("{%", "Now: {%", 1)
    other = ours(tmp_path / "b", processing_class=processor, reference=reference)
    with pytest.raises(RefusedError, match="are not those that its cached log-probability was"):
        step(other)


@pytest.mark.full
@pytest.mark.parametrize("bf16", [False, True])
def test_the_numerics_of_a_cache_must_match_the_configuration(
    tmp_path: Path, caplog, bf16: bool
) -> None:
    """Both behave as docs/guides/trainers/trl.md describes; any other cache is reported as off."""
    pairs().to_parquet(str(tmp_path / "pairs.parquet"))
    records = realign.read_records(tmp_path / "pairs.parquet", None)
    for autocast in (bf16, not bf16):
        scoring = realign.Scoring(
            MODEL, 3, "label", realign.Numerics(torch.float32, autocast=autocast)
        )
        realign.build_cache(records, scoring, tmp_path / "cache")
        reference = realign.read_cache(tmp_path / "cache", records, scoring.identity())
        options = {"model": str(MODEL), "reference": reference, "training": {"bf16": bf16}}
        trainer = ours(tmp_path / "run", **options)
        trainer.train()
        is_off = abs(trainer.state.log_history[0]["loss"] - 2 * math.log(2)) > 1e-6
        assert is_off == ("the first loss must be" in caplog.text) == (autocast != bf16)


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_streamed_datasets_and_several_evaluation_sets_are_accepted(
    tmp_path: Path, data_path: str
) -> None:
    trainer = ours(
        tmp_path,
        data_path=data_path,
        train_dataset=pairs(4).to_iterable_dataset(),
        eval_dataset={"a": pairs(2, 5), "b": pairs(3, 6).to_iterable_dataset()},
        training={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    )
    trainer.train()
    history = json.dumps(trainer.state.log_history)
    for name in ("eval_a_loss", "eval_b_loss", "eval_rewards/image_margins", "eval_entropy"):
        assert f'"{name}"' in history


def test_evaluation_does_not_count_tokens_nor_change_training_metrics(tmp_path: Path) -> None:
    trainer = ours(tmp_path, eval_dataset=pairs(2, 5))
    step(trainer)
    before = {name: list(values) for name, values in trainer._metrics["train"].items()}
    found = trainer.evaluate()
    assert found["eval_num_tokens"] == before["num_tokens"][0]
    assert found["eval_rewards/image_accuracies"] in (0.0, 0.5, 1.0)
    assert before == trainer._metrics["train"]


def test_a_pair_without_a_retrieved_image_has_no_image_term(tmp_path: Path) -> None:
    def without(dataset: Any, *rows: int) -> Any:
        left_out = dataset.map(
            lambda row, index: {} if index not in rows else {"rejected_images": []},
            with_indices=True,
        )
        return left_out.cast(dataset.features)

    whole = step(ours(tmp_path, model=policy_model())).metrics
    some = step(ours(tmp_path, train_dataset=without(pairs(), 1, 3)))
    none = step(ours(tmp_path, train_dataset=without(pairs(), 0, 1, 2, 3)))
    text = step(ours(tmp_path, objective=Objective.dpo()))
    assert none.loss == pytest.approx(text.loss, abs=1e-6)
    assert none.metrics.keys() == text.metrics.keys()
    assert some.metrics["rewards/margins"] == pytest.approx(whole["rewards/margins"], abs=1e-6)
    assert some.metrics["rewards/image_margins"] != whole["rewards/image_margins"]


@pytest.mark.parametrize("data_path", ["own", "native"])
def test_mixed_precision_training_matches_float32(tmp_path: Path, data_path: str) -> None:
    exact = step(ours(tmp_path / "a", data_path=data_path)).loss
    trainer = ours(tmp_path / "b", data_path=data_path, training={"bf16": True})
    trainer.train()
    (line, _) = trainer.state.log_history
    assert line["loss"] != exact
    assert line["loss"] == pytest.approx(exact, abs=0.05)


def test_rows_of_the_native_collator_are_cell_by_cell() -> None:
    processor = load_processor(MODEL)
    rows = [dict(row) for row in pairs(2)]
    for num_cells in (2, 3, 4):
        batch = NativeCollator(processor, num_cells=num_cells)(rows)
        assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 2 * num_cells
        answers = [
            processor.tokenizer.decode(ids[mask > 0], skip_special_tokens=True).strip()
            for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        of_cells = ("chosen", "rejected", "chosen", "rejected")[:num_cells]
        assert answers == [row[name][0]["content"] for name in of_cells for row in rows]
        for cell in range(num_cells):
            images = [row["images" if cell < 2 else "rejected_images"][0] for row in rows]
            expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            assert torch.equal(batch["pixel_values"][2 * cell : 2 * cell + 2], expected)
    assert rows[0]["prompt"] == pairs(2)[0]["prompt"]  # as they were given


def test_a_given_collator_must_make_the_rows_of_every_cell(tmp_path: Path) -> None:
    processor = load_processor(MODEL)
    expected = step(ours(tmp_path, data_path="native")).loss
    given = NativeCollator(processor, num_cells=3)
    assert step(ours(tmp_path, data_path="native", data_collator=given)).loss == expected
    # six rows of three pairs, which are also three cells of two pairs
    trainer = ours(
        tmp_path, data_path="native", data_collator=DataCollatorForVisionPreference(processor)
    )
    with pytest.raises(RefusedError, match=r"must return 3 rows per pair, .* got 6 rows for 3"):
        trainer.data_collator([dict(row) for row in pairs(3)])
