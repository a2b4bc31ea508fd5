"""The journal keeps all appended entries, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.generation import journal as journal_module
from realign.generation.journal import Journal
from tests.realign.conftest import file_limit

ENTRY = {"status": 200, "response": {"text": "half a pair \ud800, a line\nbreak and \u2028"}}


def test_an_appended_entry_is_read_back_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", ENTRY)
        assert journal["a"] == {"key": "a", **ENTRY}  # at once, not after a flush
    with Journal(path) as journal:
        assert (len(journal), "a" in journal, "b" in journal) == (1, True, False)
        assert journal["a"] == {"key": "a", **ENTRY}
        journal.append("b", {"status": 400})
        assert journal["b"]["status"] == 400
    assert path.read_bytes().count(b"\n") == 2


def test_a_truncated_last_line_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", ENTRY)
        first = path.stat().st_size
        journal.append("b", ENTRY)
    whole = path.read_bytes()
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path) as journal:
            assert (len(journal), "b" in journal) == (1, False), size
            journal.append("b", ENTRY)
        assert path.read_bytes() == whole, size


def test_a_damaged_line_is_refused_by_number(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for damaged in (b"\0\0\0\n", b"[1]\n", b'{"key": 1}\n', b"{}\n", b"\xff\n"):
        path.write_bytes(b'{"key": "a"}\n' + damaged)
        with pytest.raises(RefusedError, match=r"journal\.jsonl, line 2 must be a journal entry"):
            Journal(path)
    path.write_bytes(b'{"key": "a"}\n')
    Journal(path).close()  # the refused ones hold no lock


def test_a_second_writer_of_a_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from realign.generation.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\njournal.append('a', {})\nprint('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RefusedError, match="is being written by another run"):
            Journal(path)
        other.send_signal(signal.SIGKILL)
    with Journal(path) as journal:  # the dead hold nothing
        assert "a" in journal
        with pytest.raises(RefusedError, match="is being written by another run"):
            Journal(path)
    Journal(path).close()


def test_lines_are_synced_once_a_second_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd))[1])
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 1e9)
    journal = Journal(tmp_path / "journal.jsonl")
    assert len(synced) == 1  # the folder: the new file has a name on the disk
    journal.append("a", ENTRY)
    assert len(synced) == 1
    monkeypatch.setattr(journal_module, "SYNC_INTERVAL_S", 0.0)
    journal.append("b", ENTRY)
    assert len(synced) == 2
    journal.close()
    journal.close()
    assert len(synced) == 3


def test_a_full_disk_leaves_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", ENTRY)
        whole = path.read_bytes()
        with file_limit(len(whole) + 20), pytest.raises(OSError, match="File too large") as caught:
            journal.append("b", ENTRY)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == whole
        journal.append("b", ENTRY)
        assert journal["b"] == {"key": "b", **ENTRY}


def test_non_finite_numbers_of_a_server_become_null(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append("a", {"status": 200, "response": {"logprobs": [float("-inf"), -0.5]}})
        assert journal["a"]["response"] == {"logprobs": [None, -0.5]}
    assert b"Infinity" not in (tmp_path / "journal.jsonl").read_bytes()
