"""Two processes that train together (DDP over gloo) end with the weights of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.rank_environment import ranks_of
from tests.realign.integrations.trl import ranks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# which pairs a rank gets changes these by nothing but the order of sums
LOGGED = ("loss", "rewards/margins", "rewards/image_margins", "logps/chosen", "entropy")
LOGGED = (*LOGGED, "logits/chosen", "mean_token_accuracy", "rewards/image_accuracies")


@pytest.mark.full
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    with ranks_of(2, "-W", "ignore", ranks.__file__, tmp_path):
        for data_path in ranks.DATA_PATHS:
            ranks.run(tmp_path, data_path)
    for data_path in ranks.DATA_PATHS:
        alone, *both = [
            json.loads((tmp_path / f"{data_path}.{rank}.json").read_text())
            for rank in ("alone", 0, 1)
        ]
        assert [one["model"] for one in both] == ["DistributedDataParallel"] * 2
        for found in both:
            for line, expected in zip(found["lines"], alone["lines"], strict=True):
                prefix = "eval_" if "eval_loss" in line else ""
                for name in LOGGED:
                    assert line[prefix + name] == pytest.approx(
                        expected[prefix + name], abs=2e-6, rel=2e-6
                    ), (data_path, name)
                assert line.get("num_tokens") == expected.get("num_tokens")
        expected = load_file(tmp_path / f"{data_path}.alone.safetensors")
        for rank in (0, 1):
            weights = load_file(tmp_path / f"{data_path}.{rank}.safetensors")
            for name, value in expected.items():
                assert (weights[name] - value).abs().max() < 1e-6, (data_path, name)
