"""Two processes, something wrong on one: both stop, none waits for the other; what was saved is
continued by both and ends the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from realign.data.formats.parquet import write_parquet

SCRIPT = Path(__file__).with_name("rank_runs.py")


@pytest.mark.slow
def test_a_fault_on_one_process_stops_both(
    tmp_path: Path, records, model_dir, make_reference
) -> None:
    rows = records(16)
    write_parquet(rows, tmp_path / "data.parquet")
    reference = make_reference(model_dir, 16)
    save_file({row.id: reference[row.key] for row in rows}, tmp_path / "reference.safetensors")
    given = {
        "model": str(model_dir),
        "data": str(tmp_path / "data.parquet"),
        "reference": str(tmp_path / "reference.safetensors"),
        "folder": str(tmp_path),
    }
    ended = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(given)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["whole"] == [0, 0]

    at_fault, other = result["off reference"]
    assert at_fault.startswith("RefusedError: the first loss must be 1.386294")
    assert other.startswith("RefusedError: another process starts off its reference")

    other, at_fault = result["bad loss"]
    assert at_fault.startswith("FloatingPointError: step 2: pixel_values must be finite, got nan")
    assert other.startswith("FloatingPointError: step 2: another process has a number that is not")
    # DDP has added it to the other's by then
    for message in result["bad gradient"]:
        assert message.startswith("FloatingPointError: step 2: the gradient must be finite, got ")

    assert result["asked"] == [143, 143]
    assert result["saved when asked"] == ["checkpoint-1"]
    assert result["resumed"] == [0, 0]
    assert "state/process-1.safetensors" in result["files"]
    assert result["differ"] == []
