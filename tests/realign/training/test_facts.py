"""The facts of a run and of its rows are found once, whatever the dataset and the number of
processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from realign.config import CacheConfig, TrainConfig
from realign.data.export.official import write_official
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling.row_index import RowFile, RowIndex
from realign.reference.run import cache
from realign.training.run import train

ROWS = 8
FACTS = ("processor", "dtype", "row layout", "objective", "meta model")


def datasets_of(folder: Path, rows: list[Any]) -> dict[str, dict[str, str]]:
    """The same rows in both forms."""
    write_parquet(rows, folder / "dataset.parquet")
    write_official(rows, folder)
    return {
        "parquet": {"data": str(folder / "dataset.parquet")},
        "folder": {"data": str(folder / "pref_data.json"), "images": str(folder / "images")},
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({"parquet": 1, "folder": 2}, id="one of parquet, two of a folder"),
        pytest.param(
            {"parquet": 2, "folder": 1},
            id="two of parquet, one of a folder",
            marks=pytest.mark.full,
        ),
    ],
)
def found(request, tmp_path_factory, model_dir: Path, records) -> dict[str, Any]:
    """Return the counts of every run by the form of its dataset, with one entry per process."""
    folder = tmp_path_factory.mktemp("facts")
    model = {"model": str(model_dir)}
    datasets = datasets_of(folder, records(ROWS))
    place = cache(CacheConfig(**model, **datasets["parquet"], out=folder / "cache"))
    runs = {
        name: [
            {**model, **options, "cache": str(place), "out": str(folder / name)},
            request.param[name],
        ]
        for name, options in datasets.items()
    }
    script = Path(__file__).with_name("count_facts.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), json.dumps(runs)],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    counted: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return counted


@pytest.mark.parametrize("dataset", ["parquet", "folder"])
def test_every_fact_is_computed_once_before_the_first_step(found, dataset: str) -> None:
    for rank, counted in enumerate(found[dataset]["new"]):
        before = counted["before training"]
        assert [*before["reads"].values()] == [1] * ROWS
        assert [*before["hashes"].values()] == [1] * ROWS
        # the first rank alone checks: an original and a retrieved image of every row
        assert [*before["decodes"].values()] == ([1] * 2 * ROWS if rank == 0 else [])
        step = counted["before the first optimizer step"]
        assert max(step["reads"].values()) <= 2
        assert max(step["decodes"].values()) <= 2
        # inputs of the model are recognised by the hash of the bytes that were read for them
        fed = {row for row, times in step["reads"].items() if times == 2}
        assert 2 <= len(fed) <= 4
        assert sum(step["hashes"].values()) == ROWS + len(fed)
        after = counted["after training"]
        assert max(after["reads"].values()) <= 1 + 2  # two epochs
        assert after["facts"] == dict.fromkeys(FACTS, 1)


@pytest.mark.parametrize("dataset", ["parquet", "folder"])
def test_a_resumed_run_reads_folder_images_again_without_checking_rows(found, dataset: str) -> None:
    for counted in found[dataset]["continued"]:
        before = counted["before training"]
        assert sum(before["reads"].values()) == (ROWS if dataset == "folder" else 0)
        assert sum(before["hashes"].values()) == (ROWS if dataset == "folder" else 0)
        assert before["decodes"] == {}
        assert counted["after training"]["facts"] == dict.fromkeys(FACTS, 1)


def test_a_replaced_image_invalidates_its_check_and_cache_entry(
    tmp_path: Path, model_dir, records
) -> None:
    """The new file has the same name, size and time, in the folder of a killed run."""
    options = datasets_of(tmp_path, records(4))["folder"]
    place = cache(CacheConfig(model=str(model_dir), **options, out=tmp_path / "cache"))
    run = {"model": str(model_dir), **options, "cache": place, "batch_size": 4}
    checkpoint = train(TrainConfig(**run, out=tmp_path / "run"))
    checkpoint.rename(tmp_path / "elsewhere")
    image = sorted((tmp_path / "images").iterdir())[0]
    times, changed = os.stat(image), bytearray(image.read_bytes())
    changed[-1] ^= 1  # the checksum of PNG's last chunk, which no decoder looks at
    image.write_bytes(changed)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        RefusedError, match=r"rows: 4 stored, 4 requested; 1 requested but not stored"
    ):
        train(TrainConfig(**run, out=tmp_path / "run"))
    with pytest.raises(RefusedError, match="lacks 1 of 4 rows"):
        train(TrainConfig(**run, out=tmp_path / "other"))


def test_a_row_index_belongs_to_one_dataset_and_one_model(tmp_path: Path, records) -> None:
    def file(rows: list[Any], name: str = "model") -> RowFile:
        write_parquet(rows, tmp_path / "dataset.parquet")
        return RowFile(tmp_path / "i.json", tmp_path / "dataset.parquet", None, rows, {"m": name})

    rows = records(3)
    index = RowIndex.of(rows)
    index.cells = 3
    file(rows).keep(index)
    assert file(rows).restore() == index
    assert file(rows, "another").restore() == RowIndex.of(rows)  # not checked for it
    assert file(rows[:2]).restore() == RowIndex.of(rows[:2])
