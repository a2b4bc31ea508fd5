"""Several processes build and read one cache, over gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from realign.data.formats.parquet import write_parquet
from realign.reference import Ranks, build_cache, identity_folder, read_cache
from realign.reference.inspect import verify_cache
from tests.ports import free_port
from tests.rank_environment import rank_environment

FORK = multiprocessing.get_context("fork")


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return the result of ``work`` on each rank, or the refusal that it raises."""
    port, results = free_port(), FORK.Queue()

    def run(rank: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where it is not set
        # a forked child has none of the parent's threads, and would wait for them
        torch.set_num_threads(1)
        os.environ |= rank_environment(rank, count, port)
        PartialState._reset_state()
        try:
            result = work(Ranks())
        except Exception as error:  # the parent compares it, and waits for it
            result = f"{type(error).__name__}: {error}"
        results.put((rank, result))

    processes = [FORK.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]


def test_ranks_share_the_work_and_build_the_rows_of_one_process(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(45)

    def work(ranks: Ranks) -> list[str]:
        scoring = synthetic.Scoring(batch_size=2)
        for _ in range(2):  # the second time there is nothing to do
            build_cache(
                rows, scoring, tmp_path, identity=synthetic.identity, shard_size=6, ranks=ranks
            )
        assert len(read_cache(tmp_path, rows, synthetic.identity)) == 45
        return scoring.scored

    scored = on_ranks(3, work)
    assert sorted(id for ids in scored for id in ids) == sorted(row.id for row in rows)
    assert min(map(len, scored)) >= 9
    one = synthetic.build(rows, tmp_path / "one", shard_size=6)
    several = identity_folder(tmp_path, synthetic.identity)
    names = [sorted(path.name for path in place.glob("shards/*")) for place in (one, several)]
    assert names[0] == names[1]  # named after their content
    assert verify_cache(several)


def test_a_refusal_on_one_rank_stops_every_rank(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(8)

    class Failing(synthetic.Scoring):
        def score(self, records):
            if any(record.id == "t6" for record in records):
                raise FloatingPointError("row t6 is not finite")
            return super().score(records)

    def work(ranks: Ranks) -> None:
        build_cache(
            rows, Failing(), tmp_path, identity=synthetic.identity, shard_size=2, ranks=ranks
        )

    assert on_ranks(2, work) == ["FloatingPointError: rank 1: row t6 is not finite"] * 2
    place = identity_folder(tmp_path, synthetic.identity)
    assert not (place / "manifest.json").exists()
    assert len(list(place.glob("shards/*"))) == 3  # the others' are kept


def test_ranks_with_differing_numerics_are_refused(tmp_path: Path, synthetic) -> None:
    def work(ranks: Ranks) -> None:
        numerics = synthetic.identity["numerics"] | {"device": f"GPU {ranks.rank}"}
        identity = synthetic.identity | {"numerics": numerics}
        rows = synthetic.rows(4)
        build_cache(
            rows, synthetic.Scoring(), tmp_path, identity=identity, shard_size=2, ranks=ranks
        )

    for refused in on_ranks(2, work):
        assert "ranks must compute alike" in refused
        assert "numerics.device: cached GPU" in refused
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_shared_are_refused(tmp_path: Path, synthetic, monkeypatch) -> None:
    monkeypatch.setattr("realign.runtime.ranks.FILE_SECONDS", 0.5)
    rows = synthetic.rows(8)

    def work(ranks: Ranks) -> None:
        root = tmp_path / f"node{ranks.rank}"
        build_cache(
            rows, synthetic.Scoring(), root, identity=synthetic.identity, shard_size=2, ranks=ranks
        )

    for refused in on_ranks(2, work):
        assert "must be on a file system that all ranks share, ranks 1 do not see" in refused
    assert not list(tmp_path.glob("*/*/.shared*"))


@pytest.mark.parametrize("same", [True, False])
def test_ranks_read_equal_caches_or_none(tmp_path: Path, synthetic, same: bool) -> None:
    rows = synthetic.rows(8)
    synthetic.build(rows, tmp_path / "node0")
    synthetic.build(rows, tmp_path / "node1", shard_size=4 if same else 2)

    def work(ranks: Ranks) -> int:
        return len(read_cache(tmp_path / f"node{ranks.rank}", rows, synthetic.identity))

    found = on_ranks(2, work)
    if same:
        assert found == [8, 8]
    else:
        assert all("must be the same on every rank, got root hash" in message for message in found)


def test_a_rank_without_the_cache_stops_every_rank(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(4)
    synthetic.build(rows, tmp_path / "node0")

    def work(ranks: Ranks) -> int:
        return len(read_cache(tmp_path / f"node{ranks.rank}", rows, synthetic.identity))

    for refused in on_ranks(2, work):
        assert "rank 1: cache must be a folder of `realign cache`" in refused


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
                   "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_build_the_same_cache_as_one_process(
    launcher: str, tmp_path: Path, model_dir, records
) -> None:
    data = tmp_path / "data.parquet"
    write_parquet(records(12), data)
    cache = ["-m", "realign.cli", "cache", "--model", model_dir, "--data", data]
    cache += ["--set", "cache.batch_size=2", "--set", "cache.shard_size=4"]
    module, *options = LAUNCHERS[launcher]
    port = {"torchrun": "--master-port", "accelerate": "--main_process_port"}[launcher]
    options += [port, free_port()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (
        ["-m", module, *options, *cache, "--out", tmp_path / "two"],
        [*cache, "--out", tmp_path / "one"],
    ):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*/shards/*")}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 3
