"""The benchmark of training steps: three schemes train the same model and do the stated work."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
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
from benchmarks.step import turns, worker  # noqa: E402
from benchmarks.step.setup import Job, build_model, build_processor, build_records, vision_tower  # noqa: E402
from benchmarks.step.shapes import MODES, SCHEMES, SHAPES, predicted_ratio, work  # noqa: E402
from benchmarks.step.worker import Memory, Turns, make_trainer, scheme_module  # noqa: E402
from realign.errors import RefusedError  # noqa: E402

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
    """Return the replies of the worker to its turns."""
    torch.manual_seed(0)
    trainer, _ = make_trainer(job)
    if after_start:
        after_start(trainer)
    reports: list[dict[str, Any]] = []
    steps: Iterator[int] = iter(turns)
    trainer.add_callback(
        Turns(trainer, Memory("cpu"), reports.append, lambda: str(next(steps)), None)
    )
    trainer.train()
    return reports


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_processes_the_predicted_number_of_tokens(tmp_path, scheme, shape):
    job = Job(scheme, shape, "lora", pairs=2, steps=1, threads=1, out=str(tmp_path))
    counters: list[Counter] = []
    run(job, [1], lambda t: counters.append(Counter(t.model, job.step_shape)))
    expected = work(scheme, job.step_shape)
    assert counters[0].tokens[True] == 2 * expected.policy_tokens
    assert counters[0].tokens[False] == 2 * expected.reference_tokens
    assert counters[0].encodes == 2 * expected.encodes


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_all_schemes_train_to_the_same_losses(tmp_path, monkeypatch, mode):
    losses = {}
    for scheme in SCHEMES:
        job = Job(scheme, "tiny", mode, 2, steps=4, learning_rate=1e-2, out=str(tmp_path))
        reports = run(job, [1, 3])
        assert [len(turn["seconds"]) for turn in reports] == [1, 3]
        losses[scheme] = [loss for turn in reports for loss in turn["losses"]]
    with monkeypatch.context() as patch:
        for name in ("_use_triton", "_ChunkedLogProbFunction"):
            patch.setattr(utils, name, getattr(utils, name))  # put back afterwards
        reports = run(replace(job, plain_head=True), [4])
    losses["trl, plain head"] = reports[0]["losses"]
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
def test_rows_have_the_length_of_their_shape(name):
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
    assert "| *LoRA, tiny, float32, 1 pair per step* |" in block
    assert "at abc" in block


class Answers:
    """A worker that trains nothing and answers at once."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        """Do nothing: it is never at work."""

    def read(self) -> dict[str, Any]:
        return {"weights_bytes": 10, "cache_seconds_a_pair": 1.0}

    def turn(self, steps: int) -> dict[str, Any]:
        times = {"seconds": [2.0] * steps, "cpu_seconds": [2.0] * steps}
        return {**times, "losses": [1.0] * steps, "peak_bytes": 30}


def test_a_failed_scheme_is_reported_and_the_others_still_run(tmp_path, capsys, monkeypatch):
    class Fails(Answers):
        def turn(self, steps: int) -> dict[str, Any]:
            if self.job.scheme == "trl":
                raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")
            loss = 1.0 if self.job.scheme == "ours" else 1.1
            return {**super().turn(steps), "losses": [loss] * steps}

    monkeypatch.setattr(turns, "Worker", Fails)
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
def test_a_worker_process_that_ends_reports_its_error():
    with turns.Worker(Job("ours", "none", "lora", 1, 1)) as worker:
        with pytest.raises(RuntimeError, match="KeyError: 'none'"):
            worker.read()
        with pytest.raises(RuntimeError, match="KeyError"):
            worker.turn(1)


def test_a_readme_gets_a_table_at_each_of_its_marks():
    assert tables.with_tables("no marks") == "no marks"
    begin, end = tables.marks("step table")
    readme = f"before {begin}old{end} after"
    block = step_table.step_block(ROOT / "benchmarks" / "results")
    assert tables.with_tables(readme) == readme.replace("old", f"\n{block}\n")


def test_options_that_cannot_be_measured_are_refused(capsys, monkeypatch):
    assert step.main(["--schemes", "trl"]) == 2
    assert "--schemes must contain ours" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert step.main(["--device", "cuda"]) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err


class Clock:
    """Seconds that only turns of workers move on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "turns_of_each"), [(0.0, 0), (1.0, 0), (25.0, 6)])
def test_jobs_without_time_left_are_reported_and_earlier_measurements_stay(
    monkeypatch, seconds, turns_of_each
):
    clock = Clock()

    class Slow(Answers):
        """A worker whose every turn takes two seconds, and that is ended when time is over."""

        def turn(self, steps: int) -> dict[str, Any]:
            clock.now += 2
            if clock.now > 1000 + seconds:
                raise RuntimeError("it said nothing")
            return super().turn(steps)

    monkeypatch.setattr(turns, "time", clock)
    monkeypatch.setattr(turns, "Worker", Slow)
    jobs = {name: Job(name, "tiny", "lora", 1, 1) for name in ("ours", "authors")}
    cells = turns.run_jobs(jobs, repeats=1000, warm_steps=0, seconds=seconds)
    if not turns_of_each:
        assert {cell["status"] for cell in cells.values()} == {"not measured"}
        return
    assert {cell["status"] for cell in cells.values()} == {"ok"}
    assert [len(cell["seconds"]) for cell in cells.values()] == [turns_of_each] * 2
    step.compare(cells, jobs)
    # as fast as ours, whose tokens are fewer
    reached = 1 / predicted_ratio(
        "authors", SHAPES["tiny"], "lora", ours_checkpoints=False, checkpoints=False
    )
    assert cells["authors"]["prediction_reached"] == pytest.approx(reached)
    assert f" {100 * reached:.0f} % of what" in step.aims_line("authors", cells["authors"])


def test_a_turn_without_an_end_is_stopped(monkeypatch):
    class Hangs(Answers):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self.is_stopped = threading.Event()

        def stop(self) -> None:
            self.is_stopped.set()

        def turn(self, steps: int) -> dict[str, Any]:
            assert self.is_stopped.wait(60)
            raise RuntimeError("it said nothing")

    monkeypatch.setattr(turns, "Worker", Hangs)
    jobs = {"ours": Job("ours", "tiny", "lora", 1, 1)}
    cells = turns.run_jobs(jobs, repeats=1, warm_steps=0, seconds=0.02)
    assert cells["ours"]["status"] == "not measured"


def test_a_variant_that_does_not_fit_is_a_row(tmp_path, capsys, monkeypatch):
    class Refused(Answers):
        def read(self) -> dict[str, Any]:
            reason = "liger: true requires a liger-kernel that fits"
            return {"unavailable": reason} if self.job.liger else super().read()

    monkeypatch.setattr(turns, "Worker", Refused)
    monkeypatch.setattr(step, "missing_package", lambda contender: None)
    call = ["--shape", "tiny-qwen", "--modes", "lora", "--out", str(tmp_path), "--repeats", "1"]
    assert step.main([*call, "--schemes", "ours", "--variants", "liger"]) == 0
    assert "| ours, Liger layers | liger: true requires a liger" in capsys.readouterr().out
    cells = load(tmp_path / "cpu_step.json")["cells"]
    statuses = {key.rpartition("/")[2]: cell["status"] for key, cell in cells.items()}
    assert statuses == {"ours": "ok", "ours, Liger layers": "unavailable"}


@pytest.mark.parametrize("is_liger", [True, False])
def test_a_worker_reports_that_liger_does_not_fit(is_liger, monkeypatch, capsys):
    def refuse(job: Job) -> None:
        raise RefusedError("liger: true requires another one.")

    job = Job("ours", "tiny", "full", 1, 1, liger=is_liger)
    monkeypatch.setattr(worker, "make_trainer", refuse)
    monkeypatch.setattr(worker.sys, "argv", ["worker", json.dumps(asdict(job))])
    monkeypatch.setattr(worker.sys, "stdout", sys.stdout)  # put back afterwards
    threads = torch.get_num_threads()
    try:
        if is_liger:
            worker.main()
            printed = json.loads(capsys.readouterr().out)
            assert printed == {"unavailable": "liger: true requires another one."}
        else:
            with pytest.raises(RefusedError, match="requires another one"):
                worker.main()
    finally:
        torch.set_num_threads(threads)


def test_names_of_profiles_have_no_commas(tmp_path):
    file = step.profile_file(tmp_path, "tiny", "lora", "ours, Liger layers")
    assert file == tmp_path / "tiny-lora-ours-Liger-layers.txt"


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
