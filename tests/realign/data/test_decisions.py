"""The decision file: lines are complete, the last one wins, and other content is not affected."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from realign.config import CacheConfig, CheckConfig, TrainConfig
from realign.data.dataset import read_kept_records, read_records
from realign.data.decisions import (
    Decision,
    append_decision,
    apply_decisions,
    decisions_path,
    read_decisions,
    read_history,
    undo_decision,
)
from realign.data.export.run import export
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.reference.run import cache
from realign.review.check import check
from realign.training.run import train

KEY = "0" * 64


def decide(path: Path, record, decision: str, note: str = "") -> None:
    append_decision(path, Decision(record.id, record.key, decision, note))


@pytest.fixture
def data(tmp_path: Path, records) -> Path:
    write_parquet(records(8), tmp_path / "data" / "dataset.parquet")
    return tmp_path / "data"


def test_the_last_decision_about_a_row_applies(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    assert read_decisions(path) == {}
    first = Decision("a", KEY, "drop", "two\nlines \u2028 \U0001f600")
    append_decision(path, first)
    append_decision(path, Decision("b", KEY, "keep"))
    assert read_decisions(path)["a", KEY] == first
    append_decision(path, Decision("a", KEY, "flag"))
    assert [d.decision for d in read_decisions(path).values()] == ["flag", "keep"]
    assert len(path.read_text().splitlines()) == 3
    assert json.loads(path.read_text().splitlines()[1]) == {
        "id": "b", "key": KEY, "decision": "keep",
    }  # fmt: skip


def test_undo_restores_the_previous_decision(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    made = [
        Decision("a", KEY, "drop", "first"),
        Decision("b", KEY, "keep"),
        Decision("a", KEY, "flag"),
    ]
    for decision in made:
        append_decision(path, decision)
    written = path.read_bytes()
    assert undo_decision(path, made[2])
    assert read_history(path) == made[:2]
    assert read_decisions(path)["a", KEY] == made[0]
    assert path.read_bytes().startswith(written)  # nothing is removed
    append_decision(path, Decision("b", KEY, "drop"))
    assert not undo_decision(path, made[1])  # no longer the last one about its row
    assert undo_decision(path, Decision("b", KEY, "drop"))
    assert undo_decision(path, made[1])
    assert undo_decision(path, made[0])
    assert read_decisions(path) == {}
    assert not undo_decision(path, made[0])
    assert len(path.read_text().splitlines()) == 8


def test_an_undo_without_an_earlier_decision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    append_decision(path, Decision("a", KEY, "keep"))
    with pytest.raises(RefusedError, match=r"must be one of .*'flag'\], got 'undo'"):
        append_decision(path, Decision("b", KEY, "undo"))
    with path.open("a") as file:
        file.write(f'{{"id": "b", "key": "{KEY}", "decision": "undo"}}\n')
    with pytest.raises(RefusedError, match=r"d\.jsonl, line 2 must undo a decision about its row"):
        read_decisions(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("run/dataset.parquet", "run/decisions.jsonl"),
        ("run/pairs.parquet", "run/pairs.parquet.decisions.jsonl"),
        ("run/pref.json", "run/pref.json.decisions.jsonl"),
    ],
)
def test_the_decision_file_lies_beside_the_data(tmp_path: Path, data: str, expected: str) -> None:
    (tmp_path / "run").mkdir()
    assert decisions_path(tmp_path / data) == tmp_path / expected
    assert decisions_path(tmp_path / "run") == tmp_path / "run" / "decisions.jsonl"


@pytest.mark.parametrize("cut", [1, 40, 95])
def test_a_line_truncated_by_a_kill_is_reported_and_overwritten(
    tmp_path: Path, capsys, cut: int
) -> None:
    path = tmp_path / "d.jsonl"
    append_decision(path, Decision("a", KEY, "keep"))
    whole = path.read_bytes()
    append_decision(path, Decision("b", KEY, "drop"))
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    assert list(read_decisions(path)) == [("a", KEY)]
    assert "d.jsonl: the last line is incomplete and left out" in capsys.readouterr().err
    append_decision(path, Decision("c", KEY, "flag"))
    assert list(read_decisions(path)) == [("a", KEY), ("c", KEY)]
    assert capsys.readouterr().err == ""
    assert path.read_bytes().startswith(whole)


def test_a_complete_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    append_decision(path, Decision("a", KEY, "keep", "x" * 9000))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_decisions(path)["a", KEY].decision == "keep"
    append_decision(path, Decision("b", KEY, "drop"))
    assert len(read_decisions(path)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 must be a JSON object, got b'\{'"),
        ("[]", "line 2 must be a JSON object"),
        ("", "line 2 must be a JSON object"),
        ('{"id": 1, "key": "k", "decision": "keep"}', "line 2: id must be a text, got 1"),
        ('{"id": "a", "decision": "keep"}', "line 2: key must be a text, got None"),
        ('{"id": "a", "key": "k", "decision": "keep"}', "line 2: key must be the row's SHA-256"),
        (f'{{"id": "a", "key": "{KEY}", "decision": "no"}}', r"line 2: decision must be one of"),
        (f'{{"id": "a", "key": "{KEY}", "decision": "keep", "x": 1}}', r"must be of .* got \['x'"),
        (f'{{"id": "a", "key": "{KEY}", "decision": "keep", "note": null}}', "note must be a text"),
    ],
)
def test_a_line_that_is_not_a_decision_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    good = f'{{"id": "a", "key": "{KEY}", "decision": "keep"}}\n'
    path.write_text(good + line + "\n" + good)
    with pytest.raises(RefusedError, match=message):
        read_decisions(path)


def test_an_invalid_decision_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="decision must be one of"):
        append_decision(tmp_path / "d.jsonl", Decision("a", KEY, "maybe"))
    assert not (tmp_path / "d.jsonl").exists()


def test_concurrent_writers_lose_no_decision(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from realign.data.decisions import Decision, append_decision\n"
        "for n in range(100):\n"
        "    decision = Decision(f'{sys.argv[2]}{n}', '0' * 64, 'keep', 'x' * 5000)\n"
        "    append_decision(Path(sys.argv[1]), decision)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(read_decisions(path)) == 200


def test_decisions_that_were_confirmed_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from realign.data.decisions import Decision, append_decision\n"
        "for n in range(10**6):\n"
        "    append_decision(Path(sys.argv[1]), Decision(str(n), '0' * 64, 'drop'))\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        printed = [process.stdout.readline() for _ in range(20)]
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        printed += process.stdout.readlines()
    confirmed = {line.decode().strip() for line in printed if line.endswith(b"\n")}
    assert len(confirmed) >= 20
    assert confirmed <= {row.id for row in read_decisions(path)}


def test_kept_rows_are_a_lazy_view(data: Path, records) -> None:
    rows = records(8)
    path = decisions_path(data)
    for index, decision in ((1, "drop"), (2, "flag"), (3, "keep"), (6, "drop")):
        decide(path, rows[index], decision)
    read = apply_decisions(read_records(data, None), read_decisions(path)).kept
    assert [record.id for record in read] == ["r0", "r2", "r3", "r4", "r5", "r7"]
    assert read[-1] == rows[7]
    assert pickle.loads(pickle.dumps(read))[1] == rows[2]  # worker processes get it so
    assert [text.images for text in read.texts()] == [()] * 6
    assert apply_decisions(rows, {}).kept is rows


def test_only_decided_rows_have_their_images_read(data: Path, records, monkeypatch) -> None:
    decide(decisions_path(data), records(8)[5], "drop")
    read = []
    source = read_records(data, None)
    whole = type(source)._read
    monkeypatch.setattr(
        type(source), "_read", lambda self, i: read.append((self is source, i)) or whole(self, i)
    )
    assert len(apply_decisions(source, read_decisions(decisions_path(data))).kept) == 7
    assert [index for is_whole, index in read if is_whole] == [5]


def test_a_decision_about_changed_content_is_reported_and_ignored(
    data: Path, records, capsys
) -> None:
    rows = records(8)
    path = decisions_path(data)
    old = dataclasses.replace(rows[2], rejected="What was there before.")
    decide(path, old, "drop")
    decide(path, dataclasses.replace(rows[0], id="gone"), "drop")
    assert len(read_kept_records(data, None)) == 8
    assert capsys.readouterr().err == (
        "1 decision(s) of decisions.jsonl not applied: the rows have changed since, first: row r2. "
        "Decide again with `realign browse`\n"
    )
    decide(path, rows[2], "keep")  # decided again: nothing to say
    left, stale = apply_decisions(rows, read_decisions(path))
    assert (len(left), stale) == (8, [])


def test_one_of_two_equal_rows_can_be_dropped_by_id(records) -> None:
    row = records(1)[0]
    twice = [row, dataclasses.replace(row, id="again")]
    decision = Decision("again", row.key, "drop")
    assert [r.id for r in apply_decisions(twice, {decision.row: decision}).kept] == ["r0"]


def test_dropping_everything_is_refused(data: Path, records) -> None:
    for row in records(8):
        decide(decisions_path(data), row, "drop")
    with pytest.raises(RefusedError, match=r"decisions\.jsonl must keep at least one row.*all 8"):
        read_kept_records(data, None)


@pytest.mark.full
def test_dropped_rows_are_not_trained_and_change_the_run_identity(
    tmp_path: Path, data: Path, records, model_dir: Path, capsys
) -> None:
    def options(out: str) -> TrainConfig:
        return TrainConfig(
            model=str(model_dir), data=data, out=tmp_path / out, batch_size=4, pairs_per_step=4
        )

    for index in (1, 4):
        decide(decisions_path(data), records(8)[index], "drop")
    train(options("run"))
    assert "2 of 8 rows dropped by decisions.jsonl" in capsys.readouterr().err
    manifests = list((tmp_path / "run" / "cache").glob("*/manifest.json"))
    assert [json.loads(path.read_text())["rows"] for path in manifests] == [6]
    decide(decisions_path(data), records(8)[4], "keep")
    with pytest.raises(
        RefusedError, match=r"rows: 6 stored, 7 requested; 1 requested but not .*: row r4"
    ):
        train(options("run"))
    whole = tmp_path / "whole.parquet"
    write_parquet([row for row in records(8) if row.id != "r1"], whole)
    train(options("dropped"))
    train(options("without").model_copy(update={"data": whole}))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("dropped", "without")]
    assert metrics[0] == metrics[1]


def test_a_bad_row_that_is_dropped_does_not_stop_the_cache(
    tmp_path: Path, records, model_dir: Path, capsys
) -> None:
    rows = records(4)
    rows[2] = dataclasses.replace(rows[2], rejected=rows[2].chosen)
    data = tmp_path / "pairs.parquet"
    write_parquet(rows, data)
    options = CacheConfig(model=str(model_dir), data=data, out=tmp_path / "cache")
    with pytest.raises(RefusedError, match=r"1 problem.* in 4 rows"):
        cache(options)
    decide(tmp_path / "pairs.parquet.decisions.jsonl", rows[2], "drop")
    manifest = json.loads((cache(options) / "manifest.json").read_text())
    assert manifest["rows"] == 3
    assert "1 of 4 rows dropped by pairs.parquet.decisions.jsonl" in capsys.readouterr().err


def test_check_and_export_leave_dropped_rows_out(tmp_path: Path, records) -> None:
    rows = records(4)
    rows[2] = dataclasses.replace(rows[2], rejected=rows[2].chosen)
    data = tmp_path / "pairs.parquet"
    write_parquet(rows, data)
    config = CheckConfig(data=data, workers=1)
    assert [problem.code for problem in check(config).problems] == ["equal-answers"]
    decide(tmp_path / "pairs.parquet.decisions.jsonl", rows[2], "drop")
    findings = check(config)
    assert (findings.num_rows, findings.problems) == (3, [])
    export(data, None, "trl", tmp_path / "out")
    exported = read_records(tmp_path / "out" / "dataset.parquet", None)
    assert [record.id for record in exported] == [rows[i].id for i in (0, 1, 3)]


def test_unreadable_rows_are_reported_by_their_number_in_the_file(tmp_path: Path, records) -> None:
    """A decision file must not stop the check at the first of them, nor shift their numbers."""
    rows = records(5)
    data = tmp_path / "pairs.parquet"
    write_parquet(rows, data, row_group_bytes=1)
    table = pq.read_table(data).to_pylist()
    table[1]["meta"] = "[bad"
    pq.write_table(pa.Table.from_pylist(table), data, row_group_size=1)
    with pq.ParquetFile(data) as file:  # the fifth row's bytes
        start = file.metadata.row_group(4).column(0).data_page_offset
    raw = bytearray(data.read_bytes())
    raw[start : start + 8] = b"\xff" * 8
    data.write_bytes(raw)
    config = CheckConfig(data=data, workers=1)
    expected = [("r1", "meta"), ("5", "damaged")]
    assert [(problem.row, problem.code) for problem in check(config).problems] == expected
    path = tmp_path / "pairs.parquet.decisions.jsonl"
    decide(path, rows[3], "drop")
    append_decision(path, Decision("r1", KEY, "keep"))  # about what the row was before
    findings = check(config)
    assert [(problem.row, problem.code) for problem in findings.problems] == expected
    assert findings.num_rows == 4
