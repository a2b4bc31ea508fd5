"""An output folder belongs to one run per command: differences and removable files are named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.runtime.run_folder import WRITES, claim, only_run


def refusal(folder: Path, verb: str, facts: dict[str, object], **options) -> str:
    with pytest.raises(RefusedError) as refused:
        claim(folder, verb, facts, **options)
    return str(refused.value)


def test_the_refusal_lists_the_files_of_that_run_and_those_to_keep(tmp_path: Path) -> None:
    claim(tmp_path, "train", {"beta": 0.1})
    for name in ("checkpoint", "dataset", "cache", "eval"):
        (tmp_path / name).mkdir()
    for name in ("metrics.jsonl", ".train.lock"):
        (tmp_path / name).write_text("")
    assert refusal(tmp_path, "train", {"beta": 0.5}).splitlines()[1:] == [
        "  beta: stored 0.1, requested 0.5",
        "Choose another folder, or remove train.json, checkpoint/, metrics.jsonl of that run and "
        "keep cache/, dataset/, eval/, not part of that run; nothing of it was changed.",
    ]


@pytest.mark.parametrize("name", ["dataset.parquet", "shards/00003.jsonl", "build.json"])
def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path, name: str) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from realign.runtime.files import replacing\n"
        f"with replacing(Path({str(tmp_path / name)!r})) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code])
    (left,) = (path for path in tmp_path.rglob("*") if path.is_file())
    others = [
        *(".mine.tmp", ".dataset.parquet.tmp", "dataset.parquet.1.tmp", ".notes.12.tmp"),
        *("mine/.dataset.parquet.12.tmp", "shards/00001.jsonl", "shards/.00001.jsonl.mine.tmp"),
        "images/.a.png.12.tmp",  # of a run that reads its source, which does not hold the folder
    ]
    for other in others:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("")
    with only_run(tmp_path, "build"):
        assert not left.exists()
        assert all((tmp_path / other).is_file() for other in others)


def test_the_removable_files_are_those_that_the_command_writes(
    tmp_path: Path, model_dir, records
) -> None:
    from realign.config import TrainConfig
    from realign.data.formats.parquet import write_parquet
    from realign.training.run import train

    write_parquet(records(2), tmp_path / "d.parquet")
    out = tmp_path / "run"
    train(TrainConfig(model=str(model_dir), data=tmp_path / "d.parquet", out=out, batch_size=2))
    names = {path.name for path in out.iterdir()} - {".train.lock"}  # held, and holds nothing
    files = {"train.json", "row_index.json", "metrics.jsonl", "checkpoint.json"}
    assert names == files | {"checkpoint", "cache"}
    assert names - {"train.json", "cache"} <= {*WRITES["train"]}


@pytest.mark.parametrize(
    ("stored", "requested", "line"),
    [
        (
            "abc",
            "abd",
            "3 stored, 3 requested; 1 requested but not stored, first: row r2; 1 stored",
        ),
        ("abc", "ab", "3 stored, 2 requested; 1 stored but not requested"),
        ("abc", "acb", "3 stored, 3 requested; repeated or in another order"),
        ("a" * 9, "b" * 9, "others stored, or in another order, 9 requested"),
    ],
)
def test_differing_rows_are_counted_and_the_first_is_named(
    tmp_path: Path, stored: str, requested: str, line: str
) -> None:
    claim(tmp_path, "train", {"rows": [f"hash {key}" for key in stored]})
    labels = {"rows": [f"row r{i}" for i in range(len(requested))]}
    message = refusal(
        tmp_path, "train", {"rows": [f"hash {key}" for key in requested]}, labels=labels
    )
    assert f"\n  rows: {line}" in message
    assert "hash" not in message


@pytest.mark.parametrize("content", [b"", b'{"beta": 0', b"\xff", b"[]"])
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes) -> None:
    record = tmp_path / "train.json"
    record.write_bytes(content)
    message = refusal(tmp_path, "train", {"beta": 0.5})
    assert message.startswith(f"{record} must be the record of a run, got a damaged file. ")
    assert message.endswith("or remove train.json of that run.")
    assert record.read_bytes() == content


def test_an_unrequested_model_is_named_without_its_files(tmp_path: Path) -> None:
    files = {"model.safetensors": "0a1b"}
    claim(tmp_path, "eval", {"models": {"base": files, "x": files}})
    message = refusal(tmp_path, "eval", {"models": {"base": files, "y": files}})
    assert message.splitlines()[1:3] == [
        "  models.x: stored, not requested",
        "  models.y: not stored, requested",
    ]


def test_shards_of_an_unknown_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "source_images").mkdir()  # known by their content
    with pytest.raises(RefusedError, match=r"holds shards of a run of `realign build` without"):
        claim(tmp_path, "build", {"seed": 0})
    (tmp_path / "shards").rmdir()
    assert not claim(tmp_path, "build", {"seed": 0})
