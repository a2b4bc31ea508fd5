"""The whole experiment at a small size has the same bytes with two processes and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from realign.demo.experiment.figures import figures
from realign.demo.experiment.protocol import SMOKE
from realign.demo.experiment.results import results, seconds
from realign.demo.experiment.stages import Experiment
from realign.demo.experiment.tables import tables
from realign.errors import RefusedError
from realign.runtime.strict_json import read_json

COMMAND = (sys.executable, "-m", "realign.demo.experiment", "--smoke", "--workers", "2")


def made(out: Path) -> dict[str, bytes]:
    files = [*out.glob("pairs/*"), *out.glob("runs/*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.full
def test_worker_count_and_kills_do_not_change_the_results(tmp_path: Path, model_dir: Path) -> None:
    alone = Experiment(SMOKE, model_dir, tmp_path / "alone", workers=1)
    alone.tune()
    alone.report()
    found = results(alone)

    out = tmp_path / "killed"
    with subprocess.Popen([*COMMAND, "--out", out], start_new_session=True) as process:
        while process.poll() is None and not [*out.glob("runs/*.json")]:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = made(out)
    assert 0 < len(before) < len(made(alone.out))
    subprocess.run([*COMMAND, "--out", out], check=True)
    after = made(out)
    assert after == made(alone.out)
    assert {name: after[name] for name in before} == before
    assert read_json(out / "results.json") == found
    assert (out / "tables.md").read_text() == tables(found)
    for name, figure in figures(found).items():
        assert (out / name).read_text() == figure
    assert seconds(alone).keys() == {Path(name).stem for name in after}

    assert {name: search["best"]["rows"] for name, search in found["tuning"].items()} == {
        "DPO": 6,
        "rDPO": 6,
    }
    steps = {(view["condition"], view["at"]): view.get("steps") for view in found["views"]}
    assert steps["DPO", "best"] == steps["DPO", "equal rows"] == 3
    assert steps["rDPO", "best"] == steps["DPO", "equal steps"] == 2
    assert steps["base", "best"] is None
    for view in found["views"]:
        assert view["scores"].keys() == {"21", "22"}
        assert 0 <= view["scores"]["21"]["free.recall"] <= 1
    for claim in found["claims"]:
        assert claim["differences"].keys() == {"21", "22"}
        assert claim["over_seeds"]["low"] <= claim["over_seeds"]["mean"]
    with pytest.raises(RefusedError, match="protocol"):
        Experiment(SMOKE.__class__(), model_dir, out, workers=1)
