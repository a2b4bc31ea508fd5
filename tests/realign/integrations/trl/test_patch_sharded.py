"""The patch under FSDP2: two processes over gloo, against TRL there and against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.rank_environment import ranks_of
from tests.realign.integrations.trl import sharded_dpo
from tests.realign.integrations.trl.sharded_dpo import CASES, take_step
from tests.realign.integrations.trl.stock import distance

RANKS = ("0", "1")
# transformers and trl on each other's names
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both processes, and return the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    with ranks_of(len(RANKS), sharded_dpo.__file__, folder):
        pass
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_patched_sharded_step_equals_the_stock_step(folder: Path, tmp_path: Path, case) -> None:
    """Weights gathered for the forward are gathered again for the backward."""
    alone, alone_loss, _ = take_step(tmp_path, is_tied=CASES[case])
    # TRL 1.16 leaves every rank with its own share of its own gradient here, not of the mean.
    is_mean = [name for name in alone if case == "tied" or name != "lm_head.weight"]
    for rank in RANKS:
        report = json.loads((folder / f"{case}.{rank}.json").read_text())
        assert report["calls"] == [2, 0]
        assert report["model"].startswith("FSDP")
        assert report["loss"] == pytest.approx(report["stock_loss"], abs=1e-6)
        assert report["loss"] == pytest.approx(alone_loss, abs=1e-6)
        found = load_file(folder / f"{case}.patched.{rank}.safetensors")
        assert distance(found, load_file(folder / f"{case}.stock.{rank}.safetensors")) <= 3e-6
        expected = {name: alone[name] for name in is_mean}
        assert distance({name: found[name] for name in is_mean}, expected) <= 3e-6
