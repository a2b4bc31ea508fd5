"""The runner of peers' tests on an invented peer: its reports, refusals and stale exceptions."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.peers.__main__ import main
from tests.peers.run import LeftOut, RefusedSourceError, read_left_out, run
from tests.peers.table import PEERS, Peer

PEER = Peer(
    tests=("tests/test_sum.py",),
    replaced={r"from adder import add": "from operator import add", r'"cuda"': '"cpu"'},
    helpers={"adder/constants.py": "adder/constants.py"},
)
TESTS = """\
import pytest
from adder import add
from adder.constants import ONE

DEVICE = "cuda"

@pytest.mark.parametrize("number", [0, 1, 2])
def test_sum(number):
    assert add(number, ONE) == number + 1

@pytest.mark.parametrize("number", [0, 1])
def test_wrong(number):
    assert add(number, ONE) == 1

@pytest.mark.skipif(DEVICE == "cpu", reason="device")
def test_device():
    pass
"""
WRONG = LeftOut(cases=r"test_wrong\[1\]", reason="one is not two")


@pytest.fixture
def source(tmp_path):
    """A folder of the peer; its files end lines as on Windows, and it cannot be imported."""
    files = {
        "tests/test_sum.py": TESTS,
        "adder/__init__.py": "raise ImportError('the peer itself')\n",
        "adder/constants.py": "ONE = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode())
    return tmp_path


def test_excluded_cases_are_reported_with_their_reason(source):
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    report = run(PEER, source, [WRONG])
    assert report.has_passed
    assert report.lines() == [
        "4 passed, 0 failed, 1 skipped, 1 deselected",
        r"  left out: 1 cases, test_wrong\[1\]: one is not two",
    ]
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_a_failing_case_fails_the_run(source):
    report = run(PEER, source, [])
    assert not report.has_passed
    assert report.lines() == ["4 passed, 1 failed, 1 skipped, 0 deselected"]


def test_an_exception_without_effect_is_stale(source):
    gone = LeftOut(cases="test_gone", reason="it is gone")
    shadowed = LeftOut(cases="test_wrong", reason="has them")
    report = run(PEER, source, [shadowed, WRONG, gone, LeftOut(file="*.txt", reason="no file")])
    assert not report.has_passed
    assert report.stale == ["*.txt", WRONG.cases, "test_gone"]
    line = "  stale: test_gone names nothing. Take it out of tests/peers/exceptions.yaml."
    assert line in report.lines()


def test_a_test_file_must_be_run_or_excluded(source):
    (source / "tests/test_other.py").write_text("")
    report = run(PEER, source, [WRONG])
    assert not report.has_passed
    assert report.lines()[-1].startswith("  neither run nor excepted: tests/test_other.py. Add it")
    other = LeftOut(file="tests/test_o*.py", reason="another function")
    report = run(PEER, source, [WRONG, other])
    assert report.has_passed
    assert report.lines()[-1] == "  left out: file, tests/test_o*.py: another function"


def test_tests_that_cannot_be_collected_fail_the_run(source):
    (source / "adder/constants.py").write_text("")
    report = run(PEER, source, [])
    assert not report.has_passed
    assert report.lines()[-1] == "  pytest ended with status 2"


@pytest.mark.parametrize("name", ["tests/test_sum.py", "adder/constants.py"])
def test_a_missing_file_is_refused(source, name):
    (source / name).unlink()
    message = f"source must hold {re.escape(name)}, got .* without it. Pass the root of a checkout"
    with pytest.raises(RefusedSourceError, match=message):
        run(PEER, source, [])


def test_a_peer_of_another_version_is_refused(source):
    """The peer itself would be tested otherwise."""
    path = source / "tests/test_sum.py"
    path.write_text(path.read_text().replace("from adder import add", "from adder.sum import add"))
    with pytest.raises(RefusedSourceError, match="must match 'from adder import add', got none in"):
        run(PEER, source, [])


def test_the_exit_status_tells_success_failure_and_refusal_apart(source, capsys, monkeypatch):
    assert main(["cce", str(source)]) == 2
    assert "source must hold tests/test_cce_loss_forward.py, got" in capsys.readouterr().err
    for arguments in (["cce"], ["nobody"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "choose from" in capsys.readouterr().err
    monkeypatch.setitem(PEERS, "cce", PEER)
    monkeypatch.setattr("tests.peers.__main__.read_left_out", lambda: {"cce": [WRONG]})
    assert main(["cce", str(source)]) == 0
    monkeypatch.setattr("tests.peers.__main__.read_left_out", dict)
    assert main(["cce", str(source)]) == 1
    assert "cce: 4 passed, 1 failed, 1 skipped, 0 deselected" in capsys.readouterr().out


def test_every_exception_has_a_reason_and_a_peer():
    for peer, entries in read_left_out().items():
        assert peer in PEERS
        for entry in entries:
            assert len(entry.reason) > 10
            assert bool(entry.file) != bool(entry.cases)


@pytest.mark.parametrize("source", ["its/folder", "a folder/of it", ""])
def test_make_passes_on_a_source_folder_with_spaces(source: str) -> None:
    command = ["make", "-n", "--no-print-directory", "test-peers", "PEER=cce", f"SOURCE={source}"]
    root = Path(__file__).parents[2]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    words = shlex.split(shown.splitlines()[-1])
    assert words[1:] == ["-m", "tests.peers", "cce", *([source] if source else [])]
