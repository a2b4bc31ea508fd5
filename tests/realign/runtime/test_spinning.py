"""Threads that wait for others leave the cores to other processes, unless the user sets this."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from realign.runtime import spinning

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the environment of a user who chose nothing, in place of this process's."""
    chosen = {name: value for name, value in os.environ.items() if name not in CHOICES}
    monkeypatch.setattr(os, "environ", chosen)
    return chosen


def test_limit_spinning_sets_the_spin_count(environment) -> None:
    spinning.limit_spinning()
    assert environment["GOMP_SPINCOUNT"] == spinning.SPIN_COUNT


@pytest.mark.parametrize("name", CHOICES)
def test_limit_spinning_keeps_the_users_setting(environment, name: str) -> None:
    environment[name] = before = "active" if name == "OMP_WAIT_POLICY" else "7"
    spinning.limit_spinning()
    assert {choice: environment.get(choice) for choice in CHOICES} == {
        **dict.fromkeys(CHOICES),
        name: before,
    }


def test_the_demo_limits_spinning_before_it_imports_torch(environment) -> None:
    code = (
        "import sys\n"
        "from realign.runtime import spinning\n"
        "spinning.limit_spinning = lambda: sys.exit(f'torch: {\"torch\" in sys.modules}')\n"
        "from realign.cli import app\n"
        "app(['demo'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "torch: False" in ended.stderr
