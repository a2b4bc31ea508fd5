"""The conftest.py beside the copy of a peer's tests, which deselects exceptions and counts."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
LEFT_OUT = FOLDER / "left_out.json"
RESULTS = FOLDER / "results.json"
# Every phase of every test; a test that fails twice counts once.
_outcomes: dict[str, str] = {}
_deselected: Counter[str] = Counter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that an exception names; the first that matches has them."""
    patterns = json.loads(LEFT_OUT.read_text(encoding="utf-8"))
    kept, left_out = [], []
    for item in items:
        pattern = next((text for text in patterns if re.search(text, item.nodeid)), None)
        if pattern is None:
            kept.append(item)
        else:
            left_out.append(item)
            _deselected[pattern] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed each test, so that its draws do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test."""
    known = _outcomes.get(report.nodeid)
    if report.failed or (report.skipped and known != "failed") or known is None:
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write what came out."""
    counts = Counter(_outcomes.values())
    results = {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "deselected": dict(_deselected),
    }
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
