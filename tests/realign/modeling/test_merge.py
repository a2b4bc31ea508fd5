"""An adapter and its base as one model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from realign.cli import app
from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from realign.modeling.merge import merge
from tests.realign.conftest import file_limit


@pytest.fixture
def adapter(tmp_path: Path, model_dir: Path) -> Path:
    """One that changes the model, its projector trained in full."""
    model = load_model(model_dir, torch.bfloat16, name=str(model_dir))
    adapted = add_adapter(
        model,
        rank=2,
        alpha=4,
        targets="all-linear",
        freeze_vision=True,
        train_projector=True,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_merged_model_computes_the_same_logits_as_the_adapter(
    tmp_path: Path, model_dir: Path, adapter: Path
) -> None:
    out = tmp_path / "merged"
    result = CliRunner().invoke(
        app, ["merge", "--model", str(adapter), "--out", str(out), "--dtype", "float32"]
    )
    assert result.exit_code == 0, result.output
    inputs = {
        "input_ids": torch.arange(5, 25)[None],
        "attention_mask": torch.ones(1, 20, dtype=torch.int64),
    }
    merged = AutoModelForImageTextToText.from_pretrained(out)
    adapted, base = load_model(adapter, torch.float32), load_model(model_dir, torch.float32)
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        logits, expected, before = (model(**inputs).logits for model in (merged, adapted, base))
        features, trained, untrained = (
            model.get_image_features(pixels).pooler_output[0]
            for model in (merged, adapted.get_base_model(), base)
        )
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(features, trained, atol=1e-4, rtol=1e-4)
    assert (features - untrained).abs().max() > 0.01
    assert AutoProcessor.from_pretrained(out).chat_template
    assert not list(out.glob("adapter*"))
    assert load_model(out, torch.float32)  # a model folder like any other


def test_the_merged_dtype_defaults_to_that_of_the_weights(tmp_path: Path, adapter: Path) -> None:
    from safetensors.torch import load_file

    (file,) = merge(str(adapter), tmp_path / "merged").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (10, "EFBIG: File too large"),
        (100_000, "Error while serializing: .*File too large .*"),  # no OSError of the weights
    ],
)
def test_a_full_disk_leaves_no_partial_folder(
    tmp_path: Path, adapter: Path, limit: int, reason: str
) -> None:
    out, before = tmp_path / "merged", {*tmp_path.iterdir()}
    with file_limit(limit):
        result = CliRunner().invoke(app, ["merge", "--model", str(adapter), "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert re.match(rf"realign: {out} could not be written \({reason}\)\. Make", result.stderr)
    assert {*tmp_path.iterdir()} == before


def test_whole_models_used_folders_and_unknown_dtypes_are_refused(
    tmp_path: Path, model_dir: Path, adapter: Path
) -> None:
    with pytest.raises(RefusedError, match=r"model must be an adapter, got .*Use it as it is"):
        merge(str(model_dir), tmp_path / "merged")
    with pytest.raises(RefusedError, match="out must be a new folder"):
        merge(str(adapter), tmp_path)
    with pytest.raises(RefusedError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        merge(str(adapter), tmp_path / "merged", "int8")
    assert not (tmp_path / "merged").exists()
