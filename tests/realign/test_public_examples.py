"""Every public name of the pipeline has an example in its docstring that gives what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import realign
from realign import Numerics, Record, Scoring, build_cache, evaluation, write_parquet
from realign.integrations import trl
from tests.docstring_examples import check_example, name_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's configuration
PUBLIC = [
    getattr(package, name)
    for package in (realign, evaluation, trl)
    for name in package.__all__
    if name != "RefusedError"  # which users catch and never call
]
# labels of questions of POPE, and two models' answers to them
POPE = {
    "pope/coco_pope_random.json": ("label", ("yes", "no", "yes", "no")),
    "answers.jsonl": ("answer", ("Yes.", "No.", "Yes.", "Yes.")),
    "base.jsonl": ("answer", ("No.", "No.", "No.", "No.")),
}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, records: Callable[..., list[Record]]
) -> Path:
    """Return a folder with the files that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "model").symlink_to(model_dir, target_is_directory=True)
    rows = records(2)
    (folder / "photo.png").write_bytes(rows[0].images[0])
    write_parquet(rows, folder / "pairs.parquet")
    build_cache(rows, Scoring(model_dir, 3, "label", Numerics(torch.float32)), folder / "cache")
    (folder / "pope").mkdir()
    for name, (key, values) in POPE.items():
        questions = [
            {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a thing {i}?", key: value}
            for i, value in enumerate(values, 1)
        ]
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in questions))
    return folder


@pytest.mark.parametrize("public", PUBLIC, ids=name_of)
def test_the_docstring_example_of_a_public_name_runs(
    public: object, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    check_example(public)
