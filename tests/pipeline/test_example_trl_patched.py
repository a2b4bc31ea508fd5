"""The example of TRL's trainer with the patch runs without changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_patched_dpo.py"


@pytest.mark.full
def test_the_patched_example_trains_and_prints_the_patched_calls(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (losses,) = re.findall(r"^loss (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert float(losses[0]) == pytest.approx(0.6931, abs=1e-4)  # the policy is the reference
    assert float(losses[1]) < 0.2
    assert "40 calls of the exact head in 20 steps" in done.stdout
    assert not any(tmp_path.iterdir())


def test_the_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 80
