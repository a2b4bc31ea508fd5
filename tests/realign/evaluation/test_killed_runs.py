"""A killed run ends with the bytes of one that is not, for any number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from realign.config import EvalConfig
from realign.evaluation.run import evaluate
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from tests.ports import free_port
from tests.rank_environment import rank_environment
from tests.realign.evaluation.published import write_published

PROCESSES = multiprocessing.get_context("forkserver")  # libraries are imported once
PROCESSES.set_forkserver_preload(
    ["accelerate", "peft", "realign.evaluation.run", "transformers.models.llava.modeling_llava"]
)
BENCHMARKS = ("pope", "hallusionbench", "mmbench", "scienceqa")
CODE = f"{os.sep}realign{os.sep}"
TIMEOUT = 120


def ask(config: EvalConfig, environment: dict[str, str], moment: int | None, events: Any) -> None:
    """Evaluate in this process and count the calls and returns of this project's functions, and
    of what they call. At one of them the process kills itself.
    """
    os.environ |= environment
    torch.set_num_threads(1)

    def count(frame: Any, event: str, arg: Any) -> None:
        if CODE not in frame.f_code.co_filename:
            return
        events.value += 1
        if events.value == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    evaluate(config)


def run(config: EvalConfig, num_ranks: int = 1, moment: int | None = None) -> tuple[bool, int]:
    """Evaluate in processes of its own, of which the first or the last kills itself at a moment.

    Returns:
        ended: Whether all of them came to their end.
        events: How many events the process saw that was to be killed.
    """
    port = free_port()
    counts = [PROCESSES.Value("q", 0, lock=False) for _ in range(num_ranks)]
    killed = 0 if moment is None else moment % num_ranks
    processes = [
        PROCESSES.Process(
            target=ask,
            args=(
                config,
                rank_environment(rank, num_ranks, port) if num_ranks > 1 else {},
                moment if rank == killed else None,
                counts[rank],
            ),
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        processes[killed].join(TIMEOUT)
        if processes[killed].exitcode:  # as torchrun does, end the others
            for process in processes:
                process.kill()
        for process in processes:
            process.join(TIMEOUT)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return all(process.exitcode == 0 for process in processes), counts[killed].value


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_dir: Path) -> EvalConfig:
    """Return a run of a model and an adapter on four benchmarks, in batches of three."""
    folder = tmp_path_factory.mktemp("data")
    for name in BENCHMARKS:
        write_published(name, folder / "data", folder / "images")
    base = load_model(model_dir, torch.float32, name=str(model_dir))
    adapted = add_adapter(base, rank=2, alpha=4, targets="all-linear", freeze_vision=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return EvalConfig(
        models={"base": str(model_dir), "adapter": str(folder / "adapter")},
        data=folder / "data",
        images=folder / "images",
        out=folder / "whole",
        batch_size=3,
        max_new_tokens=5,
        bootstrap=20,
    )


def to(config: EvalConfig, out: Path) -> EvalConfig:
    return config.model_copy(update={"out": out})


def content(out: Path) -> dict[str, bytes]:
    """Return every file of a run folder."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".eval.lock"
    }


@pytest.fixture(scope="module")
def whole(config: EvalConfig) -> tuple[dict[str, bytes], int]:
    """Return the files of a run that nobody kills, and the events of its process."""
    ended, events = run(config)
    assert ended
    return content(config.out), events


def test_two_processes_write_the_same_bytes_as_one(config, whole, tmp_path: Path) -> None:
    assert run(to(config, tmp_path / "two"), num_ranks=2)[0]
    assert content(tmp_path / "two") == whole[0]


def test_headers_record_everything_the_answers_depend_on(config, whole) -> None:
    headers = {
        name: json.loads(whole[0][f"answers/{name}.header.json"]) for name in ("base", "adapter")
    }
    base, adapter = headers["base"], headers["adapter"]
    assert base["adapter"] is None
    assert adapter["model"] == base["model"]
    assert adapter["adapter"]["files"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    effect = adapter["adapter"]["effect"]
    assert effect["largest_logit_difference"] > 0
    assert (effect["benchmark"], effect["id"]) == ("pope", "popular-1")
    assert base["max_new_tokens"] == dict.fromkeys(BENCHMARKS, 5)
    assert base["decoding"] == {"do_sample": False, "num_beams": 1, "batch_size": 3}
    assert len(base["processor"]["chat_template_sha256"]) == 64
    assert {"torch", "transformers"} <= base["machine"]["packages"].keys()


def kill_and_compare(config, whole, folder: Path, kills: int, seed: int) -> None:
    """Kill runs of one or two processes at drawn moments, and compare the files of those that end.

    A run continues where the one before it was killed; after one that ends, a new one is begun.
    """
    rng = Random(seed)
    expected, events = whole
    number = killed = 0
    while True:
        out = to(config, folder / f"{number}")
        moment = rng.randrange(events) + 1 if killed < kills else None
        ended, _ = run(out, num_ranks=1 + (rng.randrange(4) == 0), moment=moment)
        assert ended or moment is not None, "a run failed that was not killed"
        killed += not ended
        if ended:
            assert content(out.out) == expected
            number += 1
            if killed == kills:
                return


def test_a_killed_run_ends_with_the_same_bytes(config, whole, tmp_path: Path) -> None:
    kill_and_compare(config, whole, tmp_path, kills=2, seed=0)


@pytest.mark.full
def test_a_run_killed_at_twenty_moments_ends_with_the_same_bytes(
    config, whole, tmp_path: Path
) -> None:
    kill_and_compare(config, whole, tmp_path, kills=20, seed=1)
