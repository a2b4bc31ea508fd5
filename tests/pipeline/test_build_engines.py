"""The same input gives the same bytes, whatever the engine, workers and size of a shard, and
however often the run was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import yaml

from realign.building.run import build
from realign.config import BuildConfig
from realign.demo.data import build_config, write_training_data
from tests.conftest import running

# what a build leaves behind that must not depend on how it was run
RESULTS = ("dataset.parquet", "funnel.json", "rejected.jsonl", "images/00000.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_training_data(folder, 20, seed=0)
    return folder


def small(world: Path, out: Path, **options: object) -> BuildConfig:
    """40 rows in windows of 8."""
    config = build_config(world, out, seed=0)
    return config.model_copy(
        update={"batch_size": 8, "window": 8, "shard_size": 8, "workers": 1, "top_k": 3, **options}
    )


@pytest.fixture(scope="module")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return results(build(small(world, tmp_path_factory.mktemp("expected") / "out")).parent)


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def joined(out: Path) -> bytes:
    """Return all outcomes, from all shards."""
    return b"".join(path.read_bytes() for path in sorted((out / "shards").iterdir()))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"workers": 2}, marks=pytest.mark.full, id="workers=2"),
        {"shard_size": 1},  # rounded up to a window
        pytest.param(
            {"shard_size": 24, "workers": 2}, marks=pytest.mark.full, id="shard_size=24,workers=2"
        ),
        pytest.param({"shard_size": 1000}, marks=pytest.mark.full, id="shard_size=1000"),
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_engine_workers_and_shard_size_do_not_change_the_result(
    world: Path, tmp_path: Path, expected: dict[str, bytes], options: dict[str, object]
) -> None:
    build(small(world, tmp_path / "out", **options))
    assert results(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(("shards",), id="last-stage", marks=pytest.mark.full),
        pytest.param(("embeddings", "neighbours", "shards"), id="all", marks=pytest.mark.slow),
    ],
)
def test_two_local_ray_workers_give_the_same_result(
    world: Path, tmp_path: Path, expected: dict[str, bytes], stages: tuple[str, ...]
) -> None:
    """A build goes on with Ray, in a process of its own: Ray warns about itself when it is
    imported. Every actor of every stage imports all libraries, which is what takes the time.
    """
    config = small(world, tmp_path / "out", engine="ray", workers=2)
    dataset = build(config.model_copy(update={"engine": "process", "workers": 1}))
    dataset.unlink()
    for stage in stages:
        shutil.rmtree(config.out / stage)
    with run(config) as process:
        assert process.wait() == 0, config.out.with_suffix(".log").read_text()
    assert results(config.out) == expected


def test_a_build_continues_with_other_workers_but_not_with_another_window(
    world: Path, tmp_path: Path
) -> None:
    """A run may go on with other workers; another window is another run."""
    config = small(world, tmp_path / "out")
    build(config)
    (config.out / "dataset.parquet").unlink()
    (config.out / "shards" / "00001.jsonl").unlink()
    build(config.model_copy(update={"workers": 2, "threads": 1}))
    with pytest.raises(ValueError, match=r"config\.window: stored 8, requested 16"):
        build(config.model_copy(update={"window": 16}))


KILLS = int(os.environ.get("REALIGN_KILLS", "50"))
SCENES = int(os.environ.get("REALIGN_KILL_SCENES", "200"))


@pytest.mark.slow
def test_a_build_killed_many_times_gives_the_same_bytes(tmp_path: Path) -> None:
    """The build is ended by kill -9 at random moments, workers included, many times."""
    world, killed, whole = tmp_path / "world", tmp_path / "killed", tmp_path / "whole"
    write_training_data(world, SCENES, seed=100)
    options = {"workers": 2, "batch_size": 32, "window": 32, "shard_size": 32}
    started = time.monotonic()
    with run(small(world, whole, **options)) as process:
        assert process.wait() == 0
    seconds = time.monotonic() - started
    rng = Random(0)
    kills = 0
    while kills < KILLS:
        with run(small(world, killed, **options)) as process:
            try:
                # short lives see the start and the stages one by one; one that ends is begun anew
                process.wait(timeout=rng.uniform(0.1, 1.2) * min(seconds, 30))
                assert process.returncode == 0
                remove_some(killed, rng)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
    with run(small(world, killed, **options)) as process:
        assert process.wait() == 0
    assert results(killed) == results(whole)
    assert joined(killed) == joined(whole)


@contextmanager
def run(config: BuildConfig) -> Iterator[subprocess.Popen[bytes]]:
    """The build in a process of its own, as the command line starts it; it writes OUT.log."""
    options, log = config.out.with_suffix(".yaml"), config.out.with_suffix(".log")
    options.write_text(yaml.safe_dump({"build": config.model_dump(mode="json")}))
    command = [sys.executable, "-m", "realign.cli", "build", "--config", options]
    with (
        log.open("wb") as file,
        running(command, stdout=subprocess.DEVNULL, stderr=file) as process,
    ):
        yield process


def remove_some(out: Path, rng: Random) -> None:
    """Take back the end of a build and a few of its shards."""
    shards = [*out.rglob("*.jsonl"), *out.rglob("*.safetensors")]
    for path in (out / "dataset.parquet", *rng.sample(sorted(shards), 3)):
        path.unlink()
