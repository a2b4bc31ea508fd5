"""Checkpoint folders are complete or absent, used only if unchanged, and hold no pickle."""

from __future__ import annotations

import json
import math
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from realign.runtime.files import REMOVING
from realign.training.checkpoints import (
    MANIFEST,
    SAVING,
    checkpoints,
    damage,
    newest_checkpoint,
    prune,
    seal,
)
from realign.training.state_file import random_state, read_state, set_random_state, write_state


def save(folder: Path, step: int) -> Path:
    """A checkpoint of two files, one in a folder."""
    written = folder / SAVING / f"checkpoint-{step}"
    (written / "state").mkdir(parents=True)
    (written / "model.safetensors").write_bytes(bytes([step]) * 100)
    (written / "state" / "optimizer.safetensors").write_bytes(bytes([step + 1]) * 50)
    seal(written, folder / written.name)
    return folder / written.name


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [flip, truncate, empty, zero, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "state/optimizer.safetensors", MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, harm, name) -> None:
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    announced: list[str] = []
    assert newest_checkpoint(tmp_path, announced.append) == newer  # by number, not by letters
    assert not announced
    harm(newer / name)
    assert newest_checkpoint(tmp_path, announced.append) == older
    (line,) = announced
    assert str(newer) in line
    # a digest that changed in the manifest speaks of the file that it is of
    assert Path(name).name in line or name == MANIFEST
    assert newer.is_dir()  # looking changes nothing


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        ({"schema": 2, "step": 3, "files": {"a": {"bytes": 1, "sha256": ""}}}, "has schema 2"),
        ({"schema": 1, "step": 4, "files": {"a": {"bytes": 1, "sha256": ""}}}, "is of step 4"),
        ({"schema": 1, "step": 3, "files": {}}, "names no file"),
        ({"schema": 1, "step": 3, "files": {"a": {}}}, "not readable"),
        ([], "not readable"),
        ({"schema": 1, "step": 3, "files": {"a": {"bytes": 1, "sha256": ""}}}, "was changed"),
    ],
)
def test_an_inconsistent_manifest_counts_as_damage(tmp_path: Path, manifest, why) -> None:
    place = save(tmp_path, 3)
    spaces = None if why == "was changed" else 2
    (place / MANIFEST).write_text(json.dumps(manifest, indent=spaces) + "\n")
    assert why in str(damage(place))


def test_files_of_two_checkpoints_are_never_mixed(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(older / "model.safetensors", newer)
    assert "model.safetensors was changed" in str(damage(newer))
    renamed = older.rename(tmp_path / "checkpoint-7")
    assert "is of step 1" in str(damage(renamed))


def test_a_file_that_was_added_later_does_not_count_as_damage(tmp_path: Path) -> None:
    place = save(tmp_path, 1)
    (place / "notes.txt").write_text("good one")
    assert damage(place) is None


def test_other_folders_are_not_listed_as_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-", SAVING, "checkpoint-3.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert checkpoints(tmp_path) == []
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def test_pruning_removes_old_and_later_checkpoints(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 9):
        save(tmp_path, step)
    (tmp_path / REMOVING).mkdir()  # of a run that was killed
    prune(tmp_path, tmp_path / "checkpoint-6", keep=2)
    # 8 and 9 are of a course that was left: a later run must not continue from them
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    prune(tmp_path, tmp_path / "checkpoint-6", keep=None)
    assert len(checkpoints(tmp_path)) == 2
    assert not (tmp_path / REMOVING).exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    place = save(tmp_path, 5)
    flip(place / "model.safetensors")
    assert save(tmp_path, 5) == place
    assert damage(place) is None


def test_state_round_trips_with_equal_bits_and_types(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared.T}, 7: {"codes": shared}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "name": "é", "on": True}],
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8)[1:3],
        "again": shared,
        "nothing": {},
        "infinite": float("inf"),
        "not finite": [float("nan"), (-float("inf"), 1.5)],
        "empty": torch.zeros(0, 4),
    }
    write_state(tmp_path / "new" / "state.safetensors", state)
    found = read_state(tmp_path / "new" / "state.safetensors")
    assert found["state"][0]["exp_avg"].equal(shared.T)
    assert found["state"][7]["codes"].equal(shared)
    assert found["half"].dtype == torch.bfloat16
    assert found["half"].equal(state["half"])
    assert found["bytes"].tolist() == [1, 2]
    assert found["empty"].shape == (0, 4)
    assert found["groups"] == state["groups"]
    assert type(found["groups"][0]["betas"]) is tuple
    assert (found["nothing"], found["infinite"]) == ({}, float("inf"))
    nan, rest = found["not finite"]
    assert math.isnan(nan)
    assert rest == (-float("inf"), 1.5)
    assert b"Infinity" not in (tmp_path / "new" / "state.safetensors").read_bytes()
    assert not zipfile.is_zipfile(tmp_path / "new" / "state.safetensors")


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\] must be made of .* got object"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] must have keys of str or int .* \(1, 2\)"),
        ({True: 1}, "got True"),
    ],
)
def test_state_that_only_pickle_could_hold_is_refused(tmp_path: Path, state, where) -> None:
    with pytest.raises(TypeError, match=where):
        write_state(tmp_path / "state.safetensors", state)
    assert not (tmp_path / "state.safetensors").exists()


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    np.random.standard_normal()  # leaves half a pair behind, which is state too

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), np.random.rand(),
                torch.rand(()).item(), torch.randn(()).item()]  # fmt: skip

    before = random_state()
    try:
        write_state(tmp_path / "random.safetensors", before)
        expected = draw()
        set_random_state(read_state(tmp_path / "random.safetensors"))
        assert draw() == expected
    finally:
        set_random_state(before)
