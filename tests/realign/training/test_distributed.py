"""Processes that train together end with the weights of one process that trained alone (T07, T08).

Real processes over gloo: DDP, and FSDP2 with accelerate's own preparation. Every comparison is of
numbers; an exit code of 0 proves nothing here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realign.modeling.loading import load_model
from tests.rank_environment import ranks_of
from tests.realign.training import pair_training
from tests.realign.training.pair_training import Run, run, write_pairs

# Optimizer steps of eight pairs, then five: with two ranks the last micro-step has one pair, so
# one rank has none.
PAIRS, PAIRS_PER_STEP = 13, 8


def launch(folder: Path, num_ranks: int, engines: dict[str, dict[str, dict]]) -> None:
    """Train every run on ``num_ranks`` processes, as torchrun starts them."""
    cases = folder / "cases.json"
    of_a_step = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": PAIRS_PER_STEP // 2 // num_ranks,
    }
    with_batches = {
        engine: {name: {**of_a_step, **options} for name, options in runs.items()}
        for engine, runs in engines.items()
    }
    cases.write_text(json.dumps({"folder": str(folder), "engines": with_batches}))
    with ranks_of(num_ranks, pair_training.__file__, cases):
        pass


class Seen:
    """The files that every rank wrote during a run."""

    def __init__(self, folder: Path, name: str, num_ranks: int) -> None:
        ranks = range(num_ranks)
        self.logs = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in ranks]
        self.gradients, self.weights = (
            [load_file(folder / f"{name}.{kind}.{rank}.safetensors") for rank in ranks]
            for kind in ("gradients", "weights")
        )

    def check_ranks_agree(self) -> None:
        """Check that all ranks have the same numbers to the last bit."""
        for per_rank in (self.gradients, self.weights):
            for other in per_rank[1:]:
                assert per_rank[0].keys() == other.keys()
                assert all(torch.equal(per_rank[0][name], other[name]) for name in other)
        assert all(log["lines"] == self.logs[0]["lines"] for log in self.logs)

    def check_pairs(self, expected: list[str]) -> None:
        """Check that every pair was on one rank, once, and that every rank had pairs."""
        shares = [list(chain(*log["ids"])) for log in self.logs]
        assert sorted(chain(*shares)) == sorted(expected)
        assert all(shares)

    def check_equals(self, alone: Run) -> None:
        """Compare the gradient of every step, the weights and the log."""
        first = [name for name in alone.gradients if name.startswith("0/")]
        assert difference(self.gradients[0], alone.gradients, first) <= 1e-6
        # rounding of the first step moves the second one
        assert difference(self.gradients[0], alone.gradients, list(alone.gradients)) <= 5e-6
        assert difference(self.weights[0], alone.weights, list(alone.weights)) <= 1e-6
        assert self.gradients[0].keys() == alone.gradients.keys()
        for line, expected in zip(self.logs[0]["lines"], alone.lines, strict=True):
            assert line.keys() == expected.keys()
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def difference(a: dict, b: dict, names: list[str]) -> float:
    """Return the relative difference of some tensors, taken together."""
    off = sum((a[name] - b[name]).double().square().sum() for name in names)
    return float((off / sum(b[name].double().square().sum() for name in names)).sqrt())


class Alone:
    """Runs of one process, each done once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, Run] = {}

    def __call__(self, name: str) -> Run:
        options = ALONE[name]
        key = repr(options)
        if key not in self._runs:
            self._runs[key] = run(
                self._folder, f"alone-{name}", per_device_train_batch_size=PAIRS_PER_STEP, **options
            )
        return self._runs[key]


def first_of_rank_zero(count: int) -> list[int]:
    """The pairs of its first micro-batches, by the order that seed 42 gives."""
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(42)).tolist()
    return order[:count]


RUNS = {
    "ddp": {
        "full": {"save_strategy": "steps", "save_steps": 1},
        "continued": {"resume": "full/checkpoint-1"},
        "vision": {"freeze_vision": False},
        "checked": {"is_own_reference": True, "max_steps": 1},
    },
    "fsdp2": {
        "tied": {"save": "whole", "save_strategy": "steps", "save_steps": 1},
        "resumed": {"resume": "tied/checkpoint-1"},
        "adapter": {"lora": True, "tied": False, "save": "whole-adapter"},
        "checked-shards": {"is_own_reference": True, "max_steps": 1},
    },
}
MORE_RUNS = {
    "ddp": {
        "full": {"save_strategy": "steps", "save_steps": 1},
        "continued": {"resume": "full/checkpoint-1"},
        "checkpointing": {"checkpointing": True},
        "vision": {"freeze_vision": False, "checkpointing": True},
        "lora": {"lora": True, "tied": False},
    },
    "fsdp2": {
        "tied": {},
        "adapter": {"lora": True, "tied": False},
        "untied": {"tied": False, "checkpointing": True},
        "sharded-vision": {"freeze_vision": False},
    },
}
# the same on one process
ALONE = {
    "full": {}, "tied": {}, "checkpointing": {}, "untied": {"tied": False},
    "vision": {"freeze_vision": False}, "sharded-vision": {"freeze_vision": False},
    "lora": {"lora": True, "tied": False}, "adapter": {"lora": True, "tied": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """All runs, by one start of two processes; rank 0's first micro-batch is text only."""
    folder = tmp_path_factory.mktemp("two")
    write_pairs(folder, PAIRS, without_images=first_of_rank_zero(2), without_retrieved=(5,))
    launch(folder, 2, RUNS)
    return folder


@pytest.fixture(scope="module")
def alone(two_ranks: Path) -> Callable[[str], Run]:
    """The same run on one process, with a full batch a step."""
    return Alone(two_ranks)


IDS = [f"r{index}" for index in range(PAIRS)]


@pytest.mark.parametrize("name", ["full", "vision", "tied", "adapter"])
def test_two_ranks_train_to_the_weights_of_one(two_ranks: Path, alone, name: str) -> None:
    seen = Seen(two_ranks, name, 2)
    wrapper = "DistributedDataParallel" if name in RUNS["ddp"] else "FSDP"
    assert all(log["model"].startswith(wrapper) for log in seen.logs)
    seen.check_ranks_agree()
    seen.check_pairs(IDS)
    seen.check_equals(alone(name))


@pytest.mark.parametrize("name", ["checked", "checked-shards"])
def test_the_first_step_is_checked_on_every_rank(two_ranks: Path, name: str) -> None:
    """A policy that is its own reference passes, and every margin's loss is log two."""
    without_retrieved = {*first_of_rank_zero(2), 5} & {*first_of_rank_zero(PAIRS_PER_STEP)}
    margins_per_pair = 2 - len(without_retrieved) / PAIRS_PER_STEP
    for log in Seen(two_ranks, name, 2).logs:
        (line,) = log["lines"]
        assert line["loss"] == pytest.approx(margins_per_pair * math.log(2), abs=1e-6)


def test_a_rank_without_pairs_takes_part_with_zero_weight(two_ranks: Path) -> None:
    sizes = [[len(ids) for ids in log["ids"]] for log in Seen(two_ranks, "full", 2).logs]
    assert sizes == [[2, 2, 2, 0], [2, 2, 2, 1]]


def test_sharded_weights_are_saved_as_unsharded_ones(two_ranks: Path, alone) -> None:
    """Names, values and the configured class are equal, and the tied weight is saved once."""
    alone("full").trainer.save_model(str(two_ranks / "one"))
    whole, expected = (
        load_file(two_ranks / name / "model.safetensors") for name in ("whole", "one")
    )
    assert whole.keys() == expected.keys()
    assert difference(whole, expected, list(whole)) <= 1e-6
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        assert (two_ranks / "whole" / name).read_text() == (two_ranks / "one" / name).read_text()
    loaded = dict(load_model(two_ranks / "whole", torch.float32).named_parameters())
    trained = Seen(two_ranks, "tied", 2).weights[0]
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())


def test_a_sharded_adapter_is_saved_without_its_base(two_ranks: Path, alone) -> None:
    alone("adapter").trainer.save_model(str(two_ranks / "one-adapter"))
    whole, expected = (
        load_file(two_ranks / name / "adapter_model.safetensors")
        for name in ("whole-adapter", "one-adapter")
    )
    assert whole.keys() == expected.keys()
    assert difference(whole, expected, list(whole)) <= 1e-6


@pytest.mark.parametrize(("whole", "resumed"), [("full", "continued"), ("tied", "resumed")])
def test_a_distributed_run_resumes_from_its_checkpoint(
    two_ranks: Path, whole: str, resumed: str
) -> None:
    """The weights are equal to the bit."""
    before, after = Seen(two_ranks, whole, 2), Seen(two_ranks, resumed, 2)
    after.check_ranks_agree()
    assert all(torch.equal(before.weights[0][n], w) for n, w in after.weights[0].items())
    assert before.logs[0]["lines"] == after.logs[0]["lines"]
    assert [log["ids"] for log in after.logs] == [log["ids"][2:] for log in before.logs]


def test_a_model_that_is_not_sharded_is_loaded_by_every_rank(two_ranks: Path, model_dir) -> None:
    """The other ranks would have an empty reference if the first one loaded it for all."""
    expected = dict(load_model(model_dir, torch.float32).named_parameters())
    for rank in range(2):
        loaded = load_file(two_ranks / f"reference-model.{rank}.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@pytest.mark.slow
def test_four_ranks_train_to_the_weights_of_one(tmp_path: Path) -> None:
    """The last micro-step has five pairs: one rank has two, three have one."""
    write_pairs(tmp_path, PAIRS, without_images=first_of_rank_zero(2), without_retrieved=(5,))
    launch(tmp_path, 4, MORE_RUNS)
    alone = Alone(tmp_path)
    # DDP sums in another order once it has seen which gradients come first, and starts so anew
    before, after = Seen(tmp_path, "full", 4), Seen(tmp_path, "continued", 4)
    after.check_ranks_agree()
    assert difference(after.weights[0], before.weights[0], list(before.weights[0])) <= 1e-6
    for name in (name for runs in MORE_RUNS.values() for name in runs if name in ALONE):
        seen = Seen(tmp_path, name, 4)
        seen.check_ranks_agree()
        seen.check_pairs(IDS)
        seen.check_equals(alone(name))
        assert [[len(ids) for ids in log["ids"]] for log in seen.logs] == [[2, 1]] * 3 + [[2, 2]]
