"""Micro-batches of any size give the step of the full batch: the mean is over its pairs (T06)."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.realign.training.pair_training import Run, run, write_pairs


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the relative difference of all tensors, taken together."""
    assert a.keys() == b.keys()
    off = sum((a[name] - b[name]).double().square().sum() for name in a)
    return float((off / sum(value.double().square().sum() for value in a.values())).sqrt())


def step(folder: Path, batch_size: int, accumulation: int, **options) -> Run:
    return run(
        folder,
        f"{batch_size}x{accumulation}",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **options,
    )


def check_equal(parts: Run, whole: Run) -> None:
    assert sorted(chain(*parts.ids)) == sorted(chain(*whole.ids))
    assert difference(parts.gradients, whole.gradients) <= 1e-6
    assert difference(parts.weights, whole.weights) <= 1e-6
    (line,), (expected,) = parts.lines, whole.lines
    assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> tuple[Path, Run]:
    """32 pairs with answers of two to thirty tokens, four of them without a retrieved image."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 32, without_retrieved=(3, 8, 20, 21))
    return folder, step(folder, 32, 1)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> tuple[Path, Run]:
    """13 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 13)
    return folder, step(folder, 13, 1)


@pytest.mark.parametrize(
    "accumulation", [4, *(pytest.param(number, marks=pytest.mark.full) for number in (2, 8, 32))]
)
def test_accumulated_micro_batches_equal_the_full_batch(ragged, accumulation: int) -> None:
    folder, whole = ragged
    check_equal(step(folder, 32 // accumulation, accumulation), whole)


@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [
        pytest.param(4, 4, id="4+4+4+1"),
        pytest.param(12, 2, id="12+1", marks=pytest.mark.full),
    ],
)
def test_an_uneven_last_micro_batch_is_weighted_by_its_pairs(
    uneven, batch_size: int, accumulation: int
) -> None:
    """Averaging micro-batches would weigh the one pair of the last as much as four others."""
    folder, whole = uneven
    check_equal(step(folder, batch_size, accumulation), whole)


def test_every_step_averages_over_its_own_pairs(tmp_path: Path) -> None:
    """The 13 pairs make steps of eight and five, and the last micro-batch has one pair."""
    write_pairs(tmp_path, 13)
    parts = run(tmp_path, "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole = run(tmp_path, "whole", per_device_train_batch_size=8)
    assert [len(ids) for ids in parts.ids] == [2, 2, 2, 2, 2, 2, 1]
    assert difference(parts.weights, whole.weights) <= 1e-6
    assert len(parts.lines) == len(whole.lines) == 2
    for line, expected in zip(parts.lines, whole.lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_the_evaluation_loss_is_the_mean_over_pairs(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    seen = step(tmp_path, 3, 1)
    batch = seen.trainer.data_collator(list(seen.trainer.train_dataset))
    loss, output = seen.trainer.compute_loss(seen.trainer.model, batch, return_outputs=True)
    assert loss == output.loss


def test_the_reference_is_not_rounded_where_deepspeed_rounds_inputs(
    tmp_path: Path, monkeypatch
) -> None:
    """Trainer casts floating-point inputs to DeepSpeed's dtype; -255.7 would become -256."""

    class Plugin:
        class hf_ds_config:
            dtype = staticmethod(lambda: torch.bfloat16)

    write_pairs(tmp_path, 1)
    trainer = step(tmp_path, 1, 1).trainer
    trainer.is_deepspeed_enabled = True
    # DeepSpeed itself needs a GPU
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", Plugin)
    logps = torch.tensor([[-255.7]])
    inputs = trainer._prepare_inputs({"ref_logps": logps, "pixel_values": torch.ones(1)})
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(inputs["ref_logps"], logps)
