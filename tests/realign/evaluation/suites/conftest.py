"""A recorded run of lmms-eval 0.7.3, and an environment that looks as if it had lmms-eval."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Six questions of each POPE split of the drawn world, asked of the embedded model and of an
# adapter on it by the command that `realign eval suite lmms-eval` writes; shortened.
RECORDED = Path(__file__).with_name("recorded")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the recorded run, to be changed; its questions are in ``data/``."""
    return shutil.copytree(RECORDED, tmp_path / "run")


def results_of(run: Path, model: str = "base") -> Path:
    """The file of aggregates of a model."""
    return next((run / "results" / model).rglob("*_results.json"))


def samples_of(run: Path, task: str = "realign_pope_adv", model: str = "base") -> Path:
    """The file of answers of a model to a task."""
    return next((run / "results" / model).rglob(f"*_samples_{task}.jsonl"))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Rewrite a JSON file, or every line of a file of JSON lines."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        edit(row)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package that has lmms-eval's name, version and task files."""
    site = tmp_path / "site"
    package = site / "lmms_eval"
    for name in ("pope_random", "pope_pop", "pope_adv"):
        file = package / "tasks" / "pope" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"task: {name}\n")
    (package / "__init__.py").write_text("raise RuntimeError('it is not to be imported')\n")
    metadata = site / "lmms_eval-0.7.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lmms-eval\nVersion: 0.7.3\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return package
