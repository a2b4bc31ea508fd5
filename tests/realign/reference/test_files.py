"""The files of a cache under everything that happens to files: flipped bits, cuts, kills, full
disks, two builders at once, other versions.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from realign.errors import RefusedError
from realign.modeling.identity import identity_folder
from realign.reference.inspect import verify_cache
from realign.reference.read import read_cache
from realign.reference.shards import MAX_HEADER_BYTES, MAX_ROWS, WRITER, read_shard, write_shard
from realign.reference.store import LockedCache, read_committed, read_manifest, write_manifest
from realign.runtime import lock
from realign.runtime.progress import announce
from tests.realign.conftest import file_limit

FORK = multiprocessing.get_context("fork")


def files(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != "build.lock"
    }


def committed(place: Path) -> list[Path]:
    return [place / "manifest.json", place / "identity.json", *sorted(place.glob("shards/*"))]


def refuses(root: Path, synthetic, rows) -> None:
    """Check that neither reading nor verifying accepts the files."""
    with pytest.raises(RefusedError):
        read_cache(root, rows, synthetic.identity)
    with pytest.raises(RefusedError):
        verify_cache(root)


def test_a_built_cache_is_read_back(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(11)
    place = synthetic.build(rows, tmp_path)
    assert place == identity_folder(tmp_path, synthetic.identity)
    reference = read_cache(tmp_path, rows, synthetic.identity)
    expected = synthetic.values(rows)
    for index, row in enumerate(rows):
        assert reference[row.key].tolist() == expected.logps[index].tolist()
    stored = read_committed(place).rows
    for name in ("key", "num_tokens", "token_digest", "pixel_digest"):
        assert np.array_equal(getattr(stored, name), getattr(expected, name)), name
    assert len(reference) == 11
    assert {*reference} == {row.key for row in rows}
    assert "0" * 64 not in reference
    with pytest.raises(KeyError, match="0" * 64):
        reference["0" * 64]
    assert verify_cache(tmp_path)[0].startswith(f"{place}: whole, 11 rows in 3 shards, root ")


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_flipped_bit_is_found(tmp_path: Path, synthetic, flips: int) -> None:
    rows = synthetic.rows(30)
    place = synthetic.build(rows, tmp_path, shard_size=8)
    rng = random.Random(0)
    for _ in range(flips):
        path = rng.choice(committed(place))
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refuses(tmp_path, synthetic, rows)
        path.write_bytes(good)
    assert len(read_cache(tmp_path, rows, synthetic.identity)) == 30


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def swap(path: Path, rng: random.Random) -> None:
    others = [other for other in path.parent.glob("*.safetensors") if other != path]
    other = rng.choice(others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("count", [4, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("damage", "full"),
    [
        (cut, 200),
        (swap, 20),
        *(
            pytest.param(damage, count, marks=pytest.mark.full)
            for damage, count in ((zero, 50), (lengthen, 20), (remove, 20))
        ),
    ],
)
def test_damage_is_detected_and_repaired(
    tmp_path: Path, synthetic, damage, full: int, count: int
) -> None:
    rows = synthetic.rows(30)
    place = synthetic.build(rows, tmp_path, shard_size=8)
    whole = read_cache(tmp_path, rows, synthetic.identity)
    rng = random.Random(0)
    for _ in range(count or full):
        path = rng.choice(sorted(place.glob("shards/*")) if damage is swap else committed(place))
        damage(path, rng)
        refuses(tmp_path, synthetic, rows)
        synthetic.build(rows, tmp_path, shard_size=8)
        mended = read_cache(tmp_path, rows, synthetic.identity)
        assert all(mended[key].tolist() == whole[key].tolist() for key in whole)
        assert verify_cache(tmp_path)
    assert damage is remove or list((place / "damaged").iterdir())


def test_only_the_damaged_shard_is_computed_again(tmp_path: Path, synthetic, capsys) -> None:
    rows = synthetic.rows(12)
    place = synthetic.build(rows, tmp_path)
    shard = sorted(place.glob("shards/*"))[1]
    zero(shard, random.Random(0))
    with pytest.raises(
        RefusedError, match=r"00001-.* was changed after it was written\. Run `real"
    ):
        read_cache(tmp_path, rows, synthetic.identity)
    scoring = synthetic.Scoring()
    synthetic.build(rows, tmp_path, scoring=scoring)
    assert scoring.scored == ["t4", "t5", "t6", "t7"]
    warning = f"{shard} was changed after it was written. Set aside in damaged/, computed again"
    assert warning in capsys.readouterr().err
    assert len(read_cache(tmp_path, rows, synthetic.identity)) == 12


def killed_build(synthetic, rows, root: Path, seconds: float, after: Path | None = None) -> None:
    """A build that is killed some time after its start, or after a file has content; it may end
    before.
    """

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        synthetic.build(rows, root, scoring=synthetic.Scoring(seconds=0.0005))

    process = FORK.Process(target=work)
    process.start()
    while after is not None and process.is_alive():
        if after.exists() and after.stat().st_size:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_loses_at_most_the_open_shard(tmp_path: Path, synthetic, kills: int) -> None:
    rows = synthetic.rows(400)
    rng = random.Random(0)
    done = 0
    root = tmp_path / "0"
    whole = synthetic.build(rows, tmp_path / "whole")
    for number in range(kills):
        killed_build(synthetic, rows, root, rng.uniform(0.01, 0.35))
        place = identity_folder(root, synthetic.identity)
        if place.exists():
            good = LockedCache.open(place, synthetic.identity, repairs=False)
            assert len(good.entries) == len([*place.glob("shards/0*")])  # none is half a shard
            assert len(good.rows) >= done  # nothing that was there is lost
            done = len(good.rows)
        if (place / "manifest.json").exists():
            synthetic.build(rows, root)
            assert files(place) == files(whole)
            root, done = tmp_path / str(number + 1), 0
    place = synthetic.build(rows, root)
    assert files(place) == files(whole)
    assert not list(place.rglob(".*.tmp"))  # what kills left is swept


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_four_builders_make_one_cache(tmp_path: Path, synthetic, rounds: int) -> None:
    rows = synthetic.rows(60)
    whole = files(synthetic.build(rows, tmp_path / "whole"))

    def work(root: Path, seed: int) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(random.Random(seed).uniform(0, 0.02))
        synthetic.build(rows, root, scoring=synthetic.Scoring(seconds=0.002))

    for number in range(rounds):
        root = tmp_path / str(number)
        builders = [FORK.Process(target=work, args=(root, 4 * number + i)) for i in range(4)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert [builder.exitcode for builder in builders] == [0, 0, 0, 0]
        assert files(identity_folder(root, synthetic.identity)) == whole


def test_a_second_builder_reports_that_it_waits(
    tmp_path: Path, synthetic, capfd, monkeypatch
) -> None:
    rows, is_waited_for = synthetic.rows(8), FORK.Event()

    class UntilItIsWaitedFor(synthetic.Scoring):
        def score(self, records):
            assert is_waited_for.wait(60)
            return super().score(records)

    def announce_waiting(line: str) -> None:
        announce(line)
        is_waited_for.set()

    slow = FORK.Process(
        target=synthetic.build, args=(rows, tmp_path), kwargs={"scoring": UntilItIsWaitedFor()}
    )
    slow.start()
    place = identity_folder(tmp_path, synthetic.identity)
    while slow.is_alive() and not (place / "identity.json").exists():
        time.sleep(0.01)
    monkeypatch.setattr(lock, "announce", announce_waiting)
    scoring = synthetic.Scoring()
    synthetic.build(rows, tmp_path, scoring=scoring)
    slow.join()
    assert scoring.scored == []  # the other one had done it
    assert f"another build writes {place}; waiting for it" in capfd.readouterr().err


def test_a_complete_cache_is_read_without_a_lock(tmp_path: Path, synthetic, monkeypatch) -> None:
    """The cache may lie on a file system that cannot be written."""
    rows = synthetic.rows(8)
    place = synthetic.build(rows, tmp_path)

    def refused(place: Path) -> None:
        raise AssertionError("the lock was asked for")

    monkeypatch.setattr("realign.reference.build.building", refused)
    assert synthetic.build(rows[:5], tmp_path) == place


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_builds_are_exclusive_on_file_systems_without_locks(
    tmp_path: Path, synthetic, monkeypatch, code: int
) -> None:
    import fcntl

    def no_flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    rows = synthetic.rows(40)
    work = FORK.Process(
        target=synthetic.build,
        args=(rows, tmp_path),
        kwargs={"scoring": synthetic.Scoring(seconds=0.01)},
    )
    work.start()
    place = identity_folder(tmp_path, synthetic.identity)
    while work.is_alive() and not (place / "identity.json").exists():
        time.sleep(0.005)
    scoring = synthetic.Scoring()
    synthetic.build(rows, tmp_path, scoring=scoring)
    work.join()
    assert work.exitcode == 0
    assert scoring.scored == []
    assert verify_cache(tmp_path)


def test_a_lock_file_of_a_dead_process_is_taken_over(
    tmp_path: Path, synthetic, monkeypatch
) -> None:
    import fcntl

    def no_flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    rows = synthetic.rows(400)
    lock = identity_folder(tmp_path, synthetic.identity) / "build.lock.soft"
    killed_build(synthetic, rows, tmp_path, 0.0, after=lock)
    assert lock.exists()
    synthetic.build(rows, tmp_path)
    assert len(read_cache(tmp_path, rows, synthetic.identity)) == 400


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_full_disk_is_reported_and_loses_no_row(tmp_path: Path, synthetic, count: int) -> None:
    rows = synthetic.rows(40)
    whole = synthetic.build(rows, tmp_path / "whole", shard_size=20)
    largest = max(len(data) for data in files(whole).values())
    rng = random.Random(0)
    for number in range(count):
        root = tmp_path / str(number)
        with (
            file_limit(rng.randrange(largest)),
            pytest.raises(RefusedError, match=r"could not be written \(EFBIG: File too large"),
        ):
            synthetic.build(rows, root, shard_size=20)
        place = identity_folder(root, synthetic.identity)
        assert not (place / "manifest.json").exists()
        assert not list(place.rglob(".*.tmp"))
        for path in place.glob("shards/*"):
            read_shard(path)  # whole, or not there
        assert files(synthetic.build(rows, root, shard_size=20)) == files(whole)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_fsync_is_reported_and_loses_no_row(
    tmp_path: Path, synthetic, monkeypatch, code: int
) -> None:
    rows = synthetic.rows(12)
    count = iter(range(100))
    real = os.fsync

    def failing(fd: int) -> None:
        if next(count) == 7:
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr("os.fsync", failing)
    name = errno.errorcode[code]
    with pytest.raises(
        RefusedError, match=rf"{re.escape(str(tmp_path))}.* could not be written \({name}: "
    ):
        synthetic.build(rows, tmp_path)
    monkeypatch.undo()
    scoring = synthetic.Scoring()
    place = synthetic.build(rows, tmp_path, scoring=scoring)
    assert 0 < len(scoring.scored) < 12
    assert files(place) == files(synthetic.build(rows, tmp_path / "whole"))


def test_a_reader_sees_committed_rows_during_a_build(tmp_path: Path, synthetic) -> None:
    first, more = synthetic.rows(8), synthetic.rows(60)
    place = synthetic.build(first, tmp_path)
    builder = FORK.Process(
        target=synthetic.build,
        args=(more, tmp_path),
        kwargs={"scoring": synthetic.Scoring(seconds=0.01)},
    )
    builder.start()
    reads = shards_ahead = 0
    while builder.is_alive():
        shards_ahead += len([*place.glob("shards/0*")]) > 2  # there, and named by no manifest
        assert len(read_cache(tmp_path, first, synthetic.identity)) == 8
        reads += 1
        if not shards_ahead:
            with pytest.raises(RefusedError, match="lacks 52 of 60 rows, first: row t8"):
                read_cache(tmp_path, more, synthetic.identity)
    builder.join()
    assert reads > shards_ahead > 0
    assert len(read_cache(tmp_path, more, synthetic.identity)) == 60


def test_file_times_do_not_matter(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(8)
    place = synthetic.build(rows, tmp_path)
    for number, path in enumerate(committed(place)):
        os.utime(path, (0, 0) if number % 2 else (2**33, 2**33))
    scoring = synthetic.Scoring()
    synthetic.build(rows, tmp_path, scoring=scoring)
    assert scoring.scored == []
    assert len(read_cache(tmp_path, rows, synthetic.identity)) == 8


def test_two_identities_under_one_root_never_mix(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(8)
    other = json.loads(json.dumps(synthetic.identity))
    other["semantics"]["files"]["model"] = "b" * 64
    one = synthetic.build(rows, tmp_path)
    two = synthetic.build(rows[:4], tmp_path, identity=other)
    assert len(read_cache(tmp_path, rows, synthetic.identity)) == 8
    with pytest.raises(RefusedError, match="lacks 4 of 8 rows"):
        read_cache(tmp_path, rows, other)
    for shard in one.glob("shards/*"):  # even where someone copies files over
        shutil.copy(shard, two / "shards")
    assert len(read_cache(tmp_path, rows[:4], other)) == 4
    scoring = synthetic.Scoring()
    synthetic.build(rows, tmp_path, scoring=scoring, identity=other)
    assert scoring.scored == ["t4", "t5", "t6", "t7"]
    shutil.copy(one / "manifest.json", two / "manifest.json")
    with pytest.raises(RefusedError, match=r"manifest\.json is of identity"):
        read_cache(tmp_path, rows, other)


def test_a_manifest_with_a_shard_of_another_identity_is_refused(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(4)
    place = synthetic.build(rows, tmp_path)
    entry = write_shard(place, synthetic.values(synthetic.rows(4, first=4)), "b" * 64, 1)
    manifest = read_manifest(place)
    write_manifest(place, dataclasses.replace(manifest, shards=(*manifest.shards, entry)))
    with pytest.raises(
        RefusedError, match=r"must be what manifest\.json says, got 4 rows of 3 cell"
    ):
        read_cache(tmp_path, rows, synthetic.identity)
    with pytest.raises(RefusedError, match="of identity bbbbbbbbbbbbbbbb"):
        verify_cache(tmp_path)


def test_a_cache_of_a_newer_schema_is_refused_with_its_writer(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(4)
    place = synthetic.build(rows, tmp_path)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest |= {"schema": 9, "written_by": "realign 7.0"}
    (place / "manifest.json").write_text(json.dumps(manifest))
    message = r"cache schema 4, got 9, written by realign 7\.0; this is realign .*Use that version"
    with pytest.raises(RefusedError, match=message):
        read_cache(tmp_path, rows, synthetic.identity)
    with pytest.raises(RefusedError, match=message):
        synthetic.build(rows, tmp_path)  # and is not overwritten


@pytest.mark.parametrize("schema", [2, 3])
def test_a_cache_of_an_older_schema_is_refused_with_its_writer(
    tmp_path: Path, synthetic, schema: int
) -> None:
    place = tmp_path / "0123456789abcdef"
    (place / "shards").mkdir(parents=True)
    (place / "identity.json").write_text(
        json.dumps({"schema": schema, "semantics": {}, "numerics": {}})
    )
    (place / "manifest.json").write_text('{"rows": 0, "shards": {}}')
    with pytest.raises(RefusedError, match=rf"got {schema}, written by realign 0\.1\.0 or older"):
        read_cache(tmp_path, synthetic.rows(1), synthetic.identity)


def test_shards_with_inconsistent_columns_are_refused(tmp_path: Path, synthetic) -> None:
    rows = synthetic.values(synthetic.rows(4))
    entry = write_shard(tmp_path, rows, "a" * 64, 0)
    good = (tmp_path / "shards" / entry.file).read_bytes()
    tensors = safetensors.numpy.load(good)
    length = int.from_bytes(good[:8], "little")
    about = json.loads(good[8 : 8 + length])["__metadata__"]

    def refused(data: bytes, message: str) -> None:
        import hashlib

        path = tmp_path / "shards" / f"00000-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        path.write_bytes(data)
        with pytest.raises(RefusedError, match=message):
            read_shard(path)

    def saved(**changed) -> bytes:
        kept = {name: array for name, array in {**tensors, **changed}.items() if array is not None}
        return safetensors.numpy.save(kept, metadata=about)

    refused(saved(logps=tensors["logps"].astype(np.float32)), "its columns must be")
    refused(saved(num_tokens=None), "its columns must be")
    refused(saved(more=np.zeros(1)), "its columns must be")
    refused(saved(key=tensors["key"][:2]), "its columns must be")
    refused(saved(logps=np.zeros((4, 5))), "it has 4 rows of 5 cells")
    refused(saved(logps=tensors["logps"] + 1), "its header holds the hash of other content")
    refused(safetensors.numpy.save(tensors), "its header is not that of a shard")
    refused(b"\xff" * 8 + good[8:], f"its header has .* bytes, of at most {MAX_HEADER_BYTES}")
    refused((MAX_HEADER_BYTES + 8).to_bytes(8, "little") + bytes(2 << 20), "its header has 1048584")
    refused(b"", "its header")
    refused(bytes(4 << 20), "must have at most 3048576 bytes, got 4194304")
    refused(good[:8] + b"[" * length + good[8 + length :], "its header is not that of a shard")
    claims = json.loads(about["realign"]) | {"rows": MAX_ROWS + 1}
    refused(
        safetensors.numpy.save(tensors, metadata={"realign": json.dumps(claims)}),
        f"it has {MAX_ROWS + 1} rows of 3 cells",
    )
    other = json.loads(about["realign"]) | {"schema": 2, "written_by": "realign 0.0.1"}
    refused(
        safetensors.numpy.save(tensors, metadata={"realign": json.dumps(other)}),
        r"cache schema 4, got 2, written by realign 0\.0\.1",
    )


def test_non_finite_values_are_refused_before_writing(tmp_path: Path, synthetic) -> None:
    rows = synthetic.values(synthetic.rows(4))
    for bad in (np.nan, np.inf, -np.inf):
        rows.logps[2, 1] = bad
        with pytest.raises(FloatingPointError, match="must be finite to be stored"):
            write_shard(tmp_path, rows, "a" * 64, 0)
    assert not (tmp_path / "shards").exists()


def test_equal_rows_are_equal_bytes(tmp_path: Path, synthetic) -> None:
    rows = synthetic.values(synthetic.rows(3))  # several entries of a header come in any order
    assert len({write_shard(tmp_path, rows, "a" * 64, 0).file for _ in range(30)}) == 1


def test_an_id_of_two_different_rows_is_refused(tmp_path: Path, synthetic) -> None:
    rows = synthetic.rows(3)
    again = dataclasses.replace(rows[1], id="t0")
    with pytest.raises(
        RefusedError, match=r"row t0: id must be unique, got 't0' again with other .* in row 1 "
    ):
        synthetic.build([*rows, again], tmp_path)
    place = synthetic.build([*rows, rows[0]], tmp_path)  # the same row twice is one
    assert len(LockedCache.open(place, synthetic.identity, repairs=False).rows) == 3


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_row_order_filtering_and_repetition_do_not_change_values(
    tmp_path: Path, synthetic, count: int
) -> None:
    rows = synthetic.rows(60)
    synthetic.build(rows, tmp_path)
    expected = {row.key: synthetic.values([row]).logps[0].tolist() for row in rows}
    rng = random.Random(0)
    for _ in range(count):
        some = rng.choices(rows, k=rng.randrange(1, 90))
        reference = read_cache(tmp_path, some, synthetic.identity)
        assert reference.keys() == {row.key for row in some}
        assert all(reference[row.key].tolist() == expected[row.key] for row in some)


@pytest.mark.slow
def test_a_cache_of_a_million_rows_is_written_and_read_in_bounded_time(
    tmp_path: Path, synthetic, capsys
) -> None:
    """It prints the numbers of docs/guides/cache.md; one old core needs a quarter of the bounds."""
    from realign.reference.reference import CacheReference
    from realign.reference.shards import Rows
    from realign.reference.store import read_committed

    count = 1_000_000
    rng = np.random.default_rng(0)
    rows = Rows(
        rng.integers(0, 256, (count, 32), np.uint8),
        -rng.random((count, 3)) * 100,
        np.ones((count, 3), np.int32),
        rng.integers(0, 256, (count, 3, 16), np.uint8),
        np.zeros((count, 2, 16), np.uint8),
    )
    place = identity_folder(tmp_path, synthetic.identity)
    place.mkdir(parents=True)
    started = time.perf_counter()
    work = LockedCache.open(place, synthetic.identity, repairs=True)
    work.add(rows)
    work.commit(None)
    written = time.perf_counter()
    found = read_committed(place)
    assert found is not None
    opened = time.perf_counter()
    reference = CacheReference(found.rows)
    keys = [key.tobytes().hex() for key in rows.key[::10]]
    ready = time.perf_counter()
    for key in keys[:50_000]:
        reference[key]
    looked_up = time.perf_counter()
    assert (reference.positions(keys) >= 0).all()
    together = time.perf_counter()
    with capsys.disabled():
        print(  # noqa: T201
            f"\n1,000,000 rows, {sum(e.bytes for e in work.entries) / 1e6:.0f} MB: written in "
            f"{written - started:.1f} s, opened and verified in {opened - written:.2f} s, "
            f"{50_000 / (looked_up - ready):,.0f} look-ups/s, 100,000 keys at once in "
            f"{together - looked_up:.2f} s"
        )
    assert opened - written < 4
    assert looked_up - ready < 4
    assert WRITER in found.manifest.written_by
