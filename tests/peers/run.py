"""Run a peer's own tests against our entry, in a temporary folder, and report the result."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.peers.table import PEERS_FOLDER, Peer

ROOT = PEERS_FOLDER.parents[1]


class RefusedSourceError(ValueError):
    """A folder that is not one of the peer's, or of another version."""


@dataclass(frozen=True)
class LeftOut:
    """Tests that are left out, and why: a file by its path, or cases by a part of their names."""

    reason: str
    file: str = ""
    """Pattern of the shell, from the root of the folder."""
    cases: str = ""
    """Regular expression that is searched in the names that pytest gives."""


def read_left_out() -> dict[str, list[LeftOut]]:
    """Return the exceptions from each peer's tests."""
    text = (PEERS_FOLDER / "exceptions.yaml").read_text(encoding="utf-8")
    peers: dict[str, list[dict[str, str]]] = yaml.safe_load(text)
    return {peer: [LeftOut(**entry) for entry in entries] for peer, entries in peers.items()}


@dataclass(frozen=True)
class Report:
    """The result of one run."""

    passed: int
    failed: int
    skipped: int
    deselected: dict[str, int]
    """Number of cases that each exception left out."""
    left_out: list[LeftOut]
    stale: list[str]
    """Exceptions that name nothing."""
    unnamed: list[str]
    """Test files that are neither run nor excepted."""
    status: int
    """Exit status of pytest."""

    @property
    def has_passed(self) -> bool:
        """Return whether something was tested, and nothing is wrong."""
        is_clean = not (self.failed or self.stale or self.unnamed)
        return self.status == 0 and self.passed > 0 and is_clean

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        total = sum(self.deselected.values())
        lines = [
            f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped, "
            f"{total} deselected"
        ]
        for entry in self.left_out:
            pattern = entry.file or entry.cases
            number = f"{self.deselected[pattern]} cases" if entry.cases else "file"
            if pattern not in self.stale:
                lines.append(f"  left out: {number}, {pattern}: {entry.reason}")
        lines += [
            f"  stale: {pattern} names nothing. Take it out of tests/peers/exceptions.yaml."
            for pattern in self.stale
        ]
        lines += [
            f"  neither run nor excepted: {name}. Add it to table.py or exceptions.yaml."
            for name in self.unnamed
        ]
        if self.status not in (0, 1) or not self.passed:
            lines.append(f"  pytest ended with status {self.status}")
        return lines


def run(peer: Peer, source: Path, left_out: list[LeftOut]) -> Report:
    """Run the tests of a peer's folder against our entry.

    Args:
        peer: What to take and to change.
        source: A checkout or an unpacked source distribution; it is only read.
        left_out: What to leave out.
    Raises:
        RefusedSourceError: A file or a text that is to be replaced is not there.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        _adapt(peer, source, folder)
        patterns = [entry.cases for entry in left_out if entry.cases]
        (folder / "left_out.json").write_text(json.dumps(patterns), encoding="utf-8")
        shutil.copy(PEERS_FOLDER / "plugin.py", folder / "conftest.py")
        status = _run_pytest(folder)
        results: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "deselected": {}}
        written = folder / "results.json"
        if written.exists():
            results = json.loads(written.read_text(encoding="utf-8"))
    deselected = {pattern: results["deselected"].get(pattern, 0) for pattern in patterns}
    others = sorted(_other_files(peer, source))
    files = [entry.file for entry in left_out if entry.file]
    stale = [pattern for pattern in files if not fnmatch.filter(others, pattern)]
    stale += [pattern for pattern, number in deselected.items() if number == 0]
    return Report(
        results["passed"],
        results["failed"],
        results["skipped"],
        deselected,
        left_out,
        stale,
        [name for name in others if not any(fnmatch.fnmatch(name, text) for text in files)],
        status,
    )


def _adapt(peer: Peer, source: Path, folder: Path) -> None:
    """Write the changed tests, and what they import, into a folder."""
    missing = [name for name in (*peer.tests, *peer.helpers) if not (source / name).is_file()]
    if missing:
        raise RefusedSourceError(
            f"source must hold {missing[0]}, got {source} without it. Pass the root of a checkout, "
            "or of an unpacked source distribution that has tests."
        )
    copies = {name: "test_" + Path(name).name.removeprefix("test_") for name in peer.tests}
    copies |= peer.helpers
    # Read as text, so that any kind of line end is accepted.
    texts = {copy: (source / name).read_text(encoding="utf-8") for name, copy in copies.items()}
    for pattern, replacement in peer.replaced.items():
        changed = {copy: re.sub(pattern, replacement, text) for copy, text in texts.items()}
        if changed == texts:
            raise RefusedSourceError(
                f"{peer.tests[0]} must match {pattern!r}, got none in {source}. It is of another "
                "version: see tests/peers/table.py."
            )
        texts = changed
    for copy, text in texts.items():
        place = folder / copy
        if place.parent != folder:
            place.parent.mkdir(parents=True, exist_ok=True)
            (place.parent / "__init__.py").touch()
        place.write_text(text, encoding="utf-8")


def _run_pytest(folder: Path) -> int:
    """Run pytest in a process of its own, on CPUs, with the package of this checkout."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--disable-warnings"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=folder, env=environment).returncode


def _other_files(peer: Peer, source: Path) -> set[str]:
    """Return the test files beside those that are run."""
    if peer.source is not None:
        return set()
    folders = {(source / name).parent for name in peer.tests}
    found = {
        str(path.relative_to(source)) for folder in folders for path in folder.glob("test_*.py")
    }
    return found - {*peer.tests}
