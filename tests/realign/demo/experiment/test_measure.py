"""Measurements of a model, against its own generation and against formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from realign.demo.experiment.measure import Measurer, kl_divergence
from realign.demo.experiment.scenes import Draw
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.loading import load_model

DRAW = Draw(5, 3)


@pytest.fixture(scope="module")
def measurer(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Measurer:
    return Measurer(model_dir, tmp_path_factory.mktemp("images"), kl_captions=3)


@pytest.fixture(scope="module")
def other(model_dir: Path) -> Any:
    """The embedded model with other weights in its last layer."""
    model: Any = load_model(model_dir, torch.float32).eval()
    with torch.no_grad():
        model.model.language_model.layers[-1].mlp.down_proj.weight.mul_(0.5)
    return model


def test_divergence_equals_its_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (3 * torch.randn(7, 20, generator=generator) for _ in range(2))
    for row, value in enumerate(kl_divergence(policy, reference).tolist()):
        p, q = (
            [
                math.exp(x) / math.fsum(map(math.exp, logits[row].tolist()))
                for x in logits[row].tolist()
            ]
            for logits in (policy, reference)
        )
        expected = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        assert value == pytest.approx(expected, rel=1e-12)


def test_the_divergence_is_zero_only_for_the_reference(measurer: Measurer, other: Any) -> None:
    captions = ["There is a red house at the top.", "There is a blue cup on the left.", ""]
    assert measurer.divergence(measurer.reference, DRAW, captions) == 0.0
    found = measurer.divergence(other, DRAW, captions)
    assert found is not None
    assert found > 0.01
    alone = [
        measurer.divergence(
            other, DRAW, [text if i == at else "" for i, text in enumerate(captions)]
        )
        for at in (0, 1)
    ]
    assert found == pytest.approx((alone[0] + alone[1]) / 2, abs=2e-3)
    assert measurer.divergence(other, DRAW, ["", "", ""]) is None


def test_the_first_token_is_that_of_the_whole_answer(measurer: Measurer) -> None:
    model = measurer.reference
    answers = measurer.answers(model, DRAW)
    paths = DRAW.images(measurer.images)
    generator = TransformersGenerator(model, measurer.processor, 20)
    for name, questions in DRAW.questions.items():
        whole = generator([Request(one.text, paths[name][one.scene]) for one in questions])
        for first, answer in zip(answers[name], whole, strict=True):
            assert answer.text.startswith(first["text"])
            assert (first["log_odds"] > 0) == (first["text"] == "Yes")


def test_captions_are_generated_for_the_requested_sets(measurer: Measurer) -> None:
    found = measurer.captions(measurer.reference, DRAW, ["free"])
    assert [*found] == ["free"]
    assert len(found["free"]) == 3
    assert all(one["text"].startswith("There is") and not one["is_cut"] for one in found["free"])
