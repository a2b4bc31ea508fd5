"""An adapter must change the logits of its base before it is asked anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.config import EvalConfig
from realign.errors import RefusedError
from realign.evaluation.adapter_effect import adapter_effect
from realign.evaluation.run import evaluate
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from tests.realign.evaluation.published import picture, write_published


def save_adapter(folder: Path, base: Path, size: float, *, projector: bool = False) -> Path:
    """Write an adapter whose second factors have one value, or one that moves the projector too."""
    adapted = add_adapter(
        load_model(base, torch.float32, name=str(base)),
        rank=2, alpha=2, targets="all-linear", freeze_vision=True, train_projector=projector,
    )  # fmt: skip
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, size)
        if projector and "modules_to_save" in name:
            weight.data += 0.1
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    (tmp_path / "a.png").write_bytes(picture(1))
    return Request("Is there a ball in the image?", tmp_path / "a.png")


@pytest.mark.parametrize(("size", "projector"), [(0.05, False), (0.0, True)], ids=str)
def test_the_adapter_effect_is_the_largest_logit_difference_from_the_base(
    tmp_path: Path, model_dir: Path, request_: Request, size: float, projector: bool
) -> None:
    folder = save_adapter(tmp_path / "adapter", model_dir, size, projector=projector)
    generator = TransformersGenerator.load(folder, torch.float32, 4)
    base = TransformersGenerator.load(model_dir, torch.float32, 4)
    with torch.no_grad():
        logits = [loaded.model(**loaded.inputs([request_])).logits for loaded in (generator, base)]
    difference = float((logits[0] - logits[1]).abs().max())
    assert difference > 0.01
    effect = adapter_effect(generator, folder, request_, allow_none=False)
    assert effect == pytest.approx(difference, rel=1e-4)


def test_an_adapter_without_effect_is_refused_before_the_first_question(
    tmp_path: Path, model_dir: Path
) -> None:
    write_published("pope", tmp_path / "data", tmp_path / "data")
    config = EvalConfig(
        models={"aligned": str(save_adapter(tmp_path / "adapter", model_dir, 0.0))},
        data=tmp_path / "data",
        out=tmp_path / "eval",
        max_new_tokens=2,
        bootstrap=20,
    )
    with pytest.raises(RefusedError, match=r"must change the logits .* got a largest difference"):
        evaluate(config)
    assert not (config.out / "answers").exists()
    assert not (config.out / "journal").exists()
    evaluate(config.model_copy(update={"allow_unchanged_adapter": True}))
    header = (config.out / "answers" / "aligned.header.json").read_text()
    assert '"largest_logit_difference": 0.0' in header


def test_logits_that_are_not_numbers_are_refused(
    tmp_path: Path, model_dir: Path, request_: Request
) -> None:
    folder = save_adapter(tmp_path / "adapter", model_dir, 0.05)
    generator = TransformersGenerator.load(folder, torch.float32, 4)
    weight = next(w for name, w in generator.model.named_parameters() if "lora_B" in name)
    weight.data.fill_(torch.nan)
    with pytest.raises(RefusedError, match=r"must give finite logits .* difference .* of nan"):
        adapter_effect(generator, folder, request_, allow_none=True)
