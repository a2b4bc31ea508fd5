"""The whole demo, with few scenes and steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realign.demo import run


@pytest.mark.full
def test_an_interrupted_demo_resumes_to_the_same_scores_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TRAINING_SCENES", 40)
    monkeypatch.setattr(run, "EVAL_SCENES", 6)
    monkeypatch.setattr(run, "MODELS", tuple(replace(model, epochs=0.5) for model in run.MODELS))
    out = tmp_path / "demo"
    first: dict[str, Any] = run.run_demo(out, 3)
    assert first["scores"].keys() >= {"chair", "pope_random", "pope_adversarial"}
    names = [model.name for model in run.MODELS]
    assert [*first["scores"]["chair"]["models"]] == ["base", *names]
    assert first["training_seconds"].keys() == {*names}
    page = (out / "report.html").read_text()
    assert page.index("What the image pair is for") < page.index("Before and after")
    assert json.loads((out / "summary.json").read_text())["scores"] == first["scores"]

    weights = (out / "compare" / "dpo" / "checkpoint" / "model.safetensors").read_bytes()
    (out / "shortcut.parquet").unlink()
    (out / "dataset" / "funnel.json").unlink()
    for lost in ("compare/dpo", "eval"):
        shutil.rmtree(out / lost)
    second = run.run_demo(out, 3)
    assert second["scores"] == first["scores"]
    assert (out / "compare" / "dpo" / "checkpoint" / "model.safetensors").read_bytes() == weights
