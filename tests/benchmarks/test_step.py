"""The benchmark of training steps: three schemes train the same thing at the work they claim."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer import utils

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks import tables  # noqa: E402
from benchmarks.result_files import load  # noqa: E402
from benchmarks.step import __main__ as step  # noqa: E402
from benchmarks.step import table as step_table  # noqa: E402
from benchmarks.step import turns  # noqa: E402
from benchmarks.step.setup import Job, build_model, build_processor, build_records, vision_tower  # noqa: E402
from benchmarks.step.shapes import MODES, SCHEMES, SHAPES, predicted_ratio, work  # noqa: E402
from benchmarks.step.worker import Memory, Turns, make_trainer, scheme_module  # noqa: E402

# transformers and trl on each other's names
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Counter:
    """Tokens that pass a model's decoder, and images its tower."""

    def __init__(self, model: Any, shape: Any) -> None:
        self.tokens = {True: 0, False: 0}  # with and without gradient
        self.encodes = 0
        self.shape = shape
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.model.get_decoder().register_forward_pre_hook(self._decoder, with_kwargs=True)
        vision_tower(inner)[1].register_forward_pre_hook(self._tower, with_kwargs=True)

    def _decoder(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens[torch.is_grad_enabled()] += kwargs["inputs_embeds"].shape[:2].numel()

    def _tower(self, module: Any, args: Any, kwargs: Any) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        if self.shape.family == "llava":
            self.encodes += len(pixels)
        else:
            self.encodes += len(args[1] if len(args) > 1 else kwargs["grid_thw"])


def run(job: Job, turns: list[int], after_start: Any = None) -> list[dict[str, Any]]:
    """What the worker says of turns."""
    torch.manual_seed(0)
    trainer, _ = make_trainer(job)
    if after_start:
        after_start(trainer)
    said: list[dict[str, Any]] = []
    steps: Iterator[int] = iter(turns)
    trainer.add_callback(Turns(trainer, Memory("cpu"), said.append, lambda: str(next(steps)), None))
    trainer.train()
    return said


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_does_the_work_that_the_prediction_counts(tmp_path, scheme, shape):
    job = Job(scheme, shape, "lora", pairs=2, steps=1, threads=1, out=str(tmp_path))
    counters: list[Counter] = []
    run(job, [1], lambda t: counters.append(Counter(t.model, job.step_shape)))
    expected = work(scheme, job.step_shape)
    assert counters[0].tokens[True] == 2 * expected.policy_tokens
    assert counters[0].tokens[False] == 2 * expected.reference_tokens
    assert counters[0].encodes == 2 * expected.encodes


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_all_schemes_train_the_same_thing(tmp_path, monkeypatch, mode):
    losses = {}
    for scheme in SCHEMES:
        job = Job(scheme, "tiny", mode, 2, steps=4, learning_rate=1e-2, out=str(tmp_path))
        said = run(job, [1, 3])
        assert [len(turn["seconds"]) for turn in said] == [1, 3]
        losses[scheme] = [loss for turn in said for loss in turn["losses"]]
    with monkeypatch.context() as patch:
        for name in ("_use_triton", "_ChunkedLogProbFunction"):
            patch.setattr(utils, name, getattr(utils, name))  # put back afterwards
        said = run(replace(job, plain_head=True), [4])
    losses["trl, plain head"] = said[0]["losses"]
    ours = torch.tensor(losses.pop("ours"))
    assert ours[0] == pytest.approx(1.3862944, abs=1e-6)
    assert ours[-1] < ours[0] - 0.2
    for scheme, theirs in losses.items():
        assert (torch.tensor(theirs) - ours).abs().max() < 1e-5, scheme


def test_every_process_makes_the_same_model_and_pairs():
    job = Job("ours", "tiny", "full", 2, 1)
    first, again = build_model(job).state_dict(), build_model(job).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    records, same = build_records(job), build_records(job)
    assert [record.key for record in records] == [record.key for record in same]
    assert records[0].images != records[0].rejected_images


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen", "llava-64m"])
def test_rows_are_as_long_as_their_shape_says(name):
    shape = SHAPES[name]
    (record,) = build_records(Job("authors", name, "full", 1, 1))
    collate = scheme_module(Job("authors", name, "full", 1, 1)).BranchCollator(
        build_processor(shape)
    )
    branches = collate([record])["branches"]
    tokens = shape.prefix_tokens + shape.answer_tokens
    assert [branch["input_ids"].shape for branch in branches] == [(1, tokens)] * 3
    for branch in branches:
        assert (branch["labels"] != -100).sum() == shape.answer_tokens


def test_the_prediction_is_token_arithmetic():
    shape = SHAPES["llava-1.5-7b"]
    assert shape.image_tokens == 576
    assert SHAPES["llava-1.5-7b-5-tiles"].image_tokens == 2880
    assert SHAPES["qwen2.5-vl-7b-2880"].image_tokens == 2880
    assert work("ours", shape) == (2 * 636 + 3 * 120, 0, 2)
    assert work("authors", shape) == (3 * 756, 3 * 756, 12)
    assert work("trl", shape) == (4 * 756, 4 * 756, 8)

    def ratio(scheme: str, mode: str, *recomputes: bool) -> float:
        ours, theirs = recomputes or (False, False)
        return predicted_ratio(scheme, shape, mode, ours_checkpoints=ours, checkpoints=theirs)

    assert ratio("authors", "lora") == pytest.approx(2268 * 3 / (1632 * 2))
    assert ratio("trl", "lora") == pytest.approx(3024 * 3 / (1632 * 2))
    assert ratio("authors", "full") == pytest.approx(2268 * 4 / (1632 * 3))
    assert ratio("trl", "full", False, True) == pytest.approx(3024 * 5 / (1632 * 3))


@pytest.mark.full
def test_the_script_measures_in_turn_and_writes_a_table(tmp_path, capsys):
    call = ["--shape", "tiny", "--modes", "lora", "--schemes", "ours", "authors"]
    call += ["--repeats", "2", "--warm-steps", "1", "--threads", "1", "--out", str(tmp_path)]
    assert step.main([*call, "--commit", "abc", "--profile", str(tmp_path / "profiles")]) == 0
    profile = (tmp_path / "profiles" / "tiny-lora-ours.txt").read_text()
    assert "s in operators on the CPU" in profile.splitlines()[0]
    assert "realign::score_tokens" in profile
    cells = load(tmp_path / "cpu_step.json")["cells"]
    group = "step/tiny/lora/float32/1/off"
    assert cells.keys() == {f"{group}/ours", f"{group}/authors"}
    theirs = cells[f"{group}/authors"]
    assert len(theirs["seconds"]) == 2
    assert len(theirs["losses"]) == 3
    assert theirs["loss_difference"] < 1e-5
    assert theirs["ratio"]["min"] <= theirs["ratio"]["median"] <= theirs["ratio"]["max"]
    assert theirs["peak_bytes"] > theirs["weights_bytes"]
    assert cells[f"{group}/ours"]["cache_seconds_a_pair"] > 0
    assert "| authors' scheme |" in capsys.readouterr().out
    block = step_table.step_block(tmp_path)
    assert "| *LoRA, tiny, float32, 1 pair a step* |" in block
    assert "at abc" in block


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    class Answers:
        """A worker that says what it is told to."""

        def __init__(self, job: Job) -> None:
            self.job = job

        def __enter__(self) -> Answers:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> dict[str, Any]:
            return {"weights_bytes": 10, "cache_seconds_a_pair": 1.0}

        def turn(self, steps: int) -> dict[str, Any]:
            if self.job.scheme == "trl":
                raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")
            loss = 1.0 if self.job.scheme == "ours" else 1.1
            times = {"seconds": [2.0] * steps, "cpu_seconds": [2.0] * steps}
            return {**times, "losses": [loss] * steps, "peak_bytes": 30}

    monkeypatch.setattr(turns, "Worker", Answers)
    call = ["--shape", "tiny", "--modes", "lora", "--repeats", "1", "--out", str(tmp_path)]
    assert step.main(call) == 1  # and the losses differ
    out = capsys.readouterr().out
    assert "| TRL DPOTrainer | torch.OutOfMemoryError: CUDA out of memory |" in out
    assert "| authors' scheme | 2.00 | 0.50 | 1.00 (1.00 to 1.00) |" in out
    statuses = {k.rpartition("/")[2]: c["status"] for k, c in json.loads(
        (tmp_path / "cpu_step.json").read_text()
    )["cells"].items()}  # fmt: skip
    assert statuses == {
        "ours": "ok", "authors": "ok", "trl": "failed", "trl, plain head": "failed"
    }  # fmt: skip


@pytest.mark.full
def test_a_process_that_ends_says_why():
    with turns.Worker(Job("ours", "none", "lora", 1, 1)) as worker:
        with pytest.raises(RuntimeError, match="KeyError: 'none'"):
            worker.read()
        with pytest.raises(RuntimeError, match="KeyError"):
            worker.turn(1)


def test_a_readme_gets_the_tables_that_it_has_marks_for():
    assert tables.with_tables("no marks") == "no marks"
    begin, end = tables.marks("step table")
    readme = f"before {begin}old{end} after"
    block = step_table.step_block(ROOT / "benchmarks" / "results")
    assert tables.with_tables(readme) == readme.replace("old", f"\n{block}\n")


def test_what_cannot_be_measured_is_refused(capsys, monkeypatch):
    assert step.main(["--schemes", "trl"]) == 2
    if not torch.cuda.is_available():
        assert step.main(["--device", "cuda"]) == 2


class Slow:
    """A worker whose turns take a while, until it is ended."""

    def __init__(self, job: Job) -> None:
        self.is_over = threading.Event()

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        """End it."""
        self.is_over.set()

    def read(self) -> dict[str, Any]:
        return {"weights_bytes": 10, "cache_seconds_a_pair": 1.0}

    def turn(self, steps: int) -> dict[str, Any]:
        if self.is_over.wait(0.05):
            raise RuntimeError("it said nothing")
        times = {"seconds": [2.0] * steps, "cpu_seconds": [2.0] * steps}
        return {**times, "losses": [1.0] * steps, "peak_bytes": 30}


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.5])
def test_what_there_is_no_time_for_is_said_and_what_was_measured_stays(monkeypatch, seconds):
    monkeypatch.setattr(turns, "Worker", Slow)
    jobs = {name: Job(name, "tiny", "lora", 1, 1) for name in ("ours", "trl")}
    cells = turns.run_jobs(jobs, repeats=1000, warm_steps=0, seconds=seconds)
    if seconds < 0.05:
        assert {cell["status"] for cell in cells.values()} == {"not measured"}
    else:
        assert {cell["status"] for cell in cells.values()} == {"ok"}
        assert all(0 < len(cell["seconds"]) < 1000 for cell in cells.values())
        step.compare(cells, jobs)
        assert "100 % of what" not in step.aims_line("trl", cells["trl"])  # as fast as ours


def test_a_package_that_is_missing_is_a_row(tmp_path, capsys, monkeypatch):
    find_spec = step.importlib.util.find_spec
    missing = ("trl", "flash_attn", "liger_kernel")
    monkeypatch.setattr(
        step.importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    call = ["--shape", "tiny", "tiny-qwen", "--modes", "lora", "--out", str(tmp_path)]
    call += ["--schemes", "ours", "trl", "--variants", "liger", "flash", "--minutes", "0"]
    assert step.main(call) == 1  # nothing had a turn
    out = capsys.readouterr().out
    for row in ("TRL DPOTrainer | trl is", "ours, flash-attention | flash-attn is"):
        assert f"| {row} not installed |" in out
    cells = load(tmp_path / "cpu_step.json")["cells"]
    assert {key.split("/")[1] for key in cells} == {"tiny", "tiny-qwen"}
    statuses = {key.rpartition("/")[2]: cell["status"] for key, cell in cells.items()}
    assert statuses == {
        "ours": "not measured", "trl": "unavailable", "trl, plain head": "unavailable",
        "ours, Liger layers": "unavailable", "ours, flash-attention": "unavailable",
    }  # fmt: skip
    assert "not measured yet" not in step_table.step_block(tmp_path)
