"""The script for GPUs at tiny sizes: cells that fail, that are absent, and that lack time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import checks as gpu_checks  # noqa: E402
from benchmarks.gpu import hardware as gpu_hardware  # noqa: E402
from benchmarks.gpu import native_tests, sanitizer  # noqa: E402
from benchmarks.gpu.bias import KINDS, draw_case, measure_bias  # noqa: E402
from benchmarks.gpu.head import aim_of, aims_table  # noqa: E402
from benchmarks.gpu.native_tests import NativeTests, cells_of, command  # noqa: E402
from benchmarks.gpu.paths import launches_of  # noqa: E402
from benchmarks.gpu.processes import Ended, has_ended, run_command  # noqa: E402
from benchmarks.gpu.session import Check, Session  # noqa: E402
from benchmarks.promises import outcome  # noqa: E402
from benchmarks.result_files import environment, load, merge  # noqa: E402
from realign_kernels.backends.dispatch import resolve_backend  # noqa: E402
from tests.processes import is_running, wait_until  # noqa: E402

CPU = torch.device("cpu")
HAS_KERNELS = resolve_backend("auto", "cpu") == "cpu"
AUTO = "cpu" if HAS_KERNELS else "eager"


@pytest.fixture
def call(tmp_path):
    """Arguments of a call at tiny sizes."""
    return [
        "--device", "cpu", "--backend", AUTO, "--out", str(tmp_path), "--commit", "abc"
    ]  # fmt: skip


def cells(folder: Path) -> dict:
    """The cells that were written."""
    return load(folder / "gpu_cpu.json")["cells"]


@pytest.mark.full
def test_the_gpu_script_runs_at_tiny_shapes_and_continues(tmp_path, call, capsys):
    call += ["--providers", "ours", "quack"]
    assert gpu.main(call) == 0
    found = cells(tmp_path)
    checks = [cell["status"] for key, cell in found.items() if key.startswith("checks/")]
    assert len(checks) == 96
    assert set(checks) == {"ok"}
    ours = found["head/token/float32/tiny/N96/frozen/ours"]
    assert ours["errors"]["logp_max"] < 1e-5
    assert {"ms", "ms_p10", "ms_p90", "peak_bytes", "flops_nvd", "ratio_to_gemm"} <= ours.keys()
    quack = found["head/mean/float32/tiny/N96/frozen/quack"]
    assert quack["status"] == "unavailable"
    questions = [cell["status"] for key, cell in found.items() if key.startswith("question/")]
    assert questions == ["ok"] * 12
    assert "tiny, 96, frozen" in capsys.readouterr().out

    assert gpu.main([*call, "--only", "head", "--minutes", "0"]) == 0
    assert "/ours" not in capsys.readouterr().out  # nothing of it is left to measure
    assert cells(tmp_path).keys() == found.keys()


@pytest.mark.full
def test_hardware_checks_run_at_tiny_sizes_and_find_wrong_results(
    tmp_path, call, monkeypatch, capsys
):
    call += ["--only", "hardware"]
    assert gpu.main(call) == 0
    found = cells(tmp_path)
    assert [cell["status"] for cell in found.values()] == ["ok"] * 15

    true_logprob = gpu_hardware.linear_logprob
    calls = iter(range(10**6))  # every call is off by another amount
    monkeypatch.setattr(
        gpu_hardware, "linear_logprob", lambda *a, **k: true_logprob(*a, **k) + 1e-3 * next(calls)
    )
    assert gpu.main([*call[:-2], "--only", "hardware", "--commit", "other"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED beyond 2^31, V x D\n" in printed
    assert "FAILED repeats, 1 x 1031 x 64, frozen\n  2 of 3 repeats differ" in printed
    repeats = cells(tmp_path)[f"hardware/{AUTO}/repeats, 1 x 1031 x 64, frozen"]
    assert repeats["status"] == "failed"
    assert repeats["reason"] == "2 of 3 repeats differ"


@pytest.mark.full
def test_wrong_kernels_stop_the_gpu_script(tmp_path, call, monkeypatch, capsys):
    true_logprob = gpu_checks.linear_logprob
    monkeypatch.setattr(gpu_checks, "linear_logprob", lambda *a, **k: true_logprob(*a, **k) + 2e-4)
    assert gpu.main(call) == 1
    captured = capsys.readouterr()
    assert "FAILED bfloat16 forward, plain" in captured.out
    assert "nothing was timed" in captured.err
    assert {key.partition("/")[0] for key in cells(tmp_path)} == {"checks"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", [None, *gpu.PARTS])
def test_a_missing_gpu_is_reported_with_exit_code_2(part, capsys):
    assert gpu.main([] if part is None else ["--only", part]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_shapes_are_refused(capsys):
    assert gpu.main(["--device", "cpu", "--shapes", "tiny", "huge"]) == 2
    assert "--shapes must be among ['tiny', 'tiny/N96'], got ['huge']." in capsys.readouterr().err


def test_checks_at_small_sizes_do_not_replace_the_full_checks(tmp_path, monkeypatch):
    asked = []

    def checks(device, backend, *, tiny):
        asked.append(tiny)
        yield Check("one", lambda: outcome("one", lambda: None))

    monkeypatch.setattr(gpu, "kernel_checks", checks)
    monkeypatch.setattr(gpu, "hardware_checks", checks)
    for is_quick in (True, False):
        # sizes for a GPU, in whose place the CPU is measured
        options = argparse.Namespace(device="cuda", quick=is_quick)
        session = Session(CPU, tmp_path / "x.json", environment(CPU, "abc"), minutes=1)
        for part in ("checks", "hardware"):
            gpu.PARTS[part].run(gpu.Call(session, "triton", "bfloat16", [], options))
    assert asked == [True, True, False, False]
    assert load(tmp_path / "x.json")["cells"].keys() == {
        "checks/triton/quick/one", "hardware/triton/quick/one",
        "checks/triton/one", "hardware/triton/one",
    }  # fmt: skip


def test_a_failed_cell_sets_the_exit_code_to_1(tmp_path, call, monkeypatch):
    monkeypatch.setattr(gpu, "_question_cells", lambda *_, **__: [("oops", broken)])
    monkeypatch.setattr(gpu, "kernel_checks", lambda *_, **__: [])
    monkeypatch.setattr(gpu, "head_table", lambda *_: None)
    assert gpu.main(call) == 1
    assert gpu.main([*call, "--only", "questions"]) == 1
    assert gpu.main([*call, "--only", "checks"]) == 0


def test_a_profile_without_a_kernel_has_failed():
    def event(name, kind=DeviceType.CUDA, time=2000.0):
        return SimpleNamespace(
            name=name, device_type=kind, is_user_annotation=False, self_device_time_total=time
        )

    copies = [event("Memcpy DtoH"), event("Memset"), event("aten::mm", DeviceType.CPU)]
    assert launches_of(copies)["status"] == "failed"
    assert launches_of([])["reason"] == "the profile has no kernel"
    cell = {"status": "ok", **launches_of([*copies, event("_epilogue")])}
    assert (cell["status"], cell["launches"], cell["copies"], cell["device_ms"]) == ("ok", 3, 1, 6)


def wrong(*_: object) -> None:
    raise AssertionError("off by 2\nand more")


def broken(*_: object) -> None:
    raise RuntimeError("no kernel image\nfor this device")


def test_a_failed_check_is_a_cell_and_later_checks_still_run(tmp_path, capsys):
    session = Session(CPU, tmp_path / "x.json", {"commit": "abc"}, minutes=1)
    checks = {"wrong": wrong, "broken": broken, "right": lambda: None}
    session.check(
        "checks/cpu",
        [Check(name, lambda n=name, c=check: outcome(n, c)) for name, check in checks.items()],
    )
    session.add("question/oops", broken)
    found = load(tmp_path / "x.json")["cells"]
    assert {key: cell["status"] for key, cell in found.items()} == {
        "checks/cpu/wrong": "failed", "checks/cpu/broken": "failed", "checks/cpu/right": "ok",
        "question/oops": "failed",
    }  # fmt: skip
    assert found["checks/cpu/wrong"]["reason"] == "off by 2"
    assert found["question/oops"]["reason"] == "RuntimeError: no kernel image"
    lines = session.table().splitlines()
    assert lines[1].split() == ["checks/cpu", "1", "2", "0", "0"]
    assert "checks/cpu/wrong: failed: off by 2" in lines
    assert "FAILED wrong" in capsys.readouterr().out


def test_an_unusable_gpu_is_reported_and_the_session_continues(tmp_path, monkeypatch, capsys):
    """Every later call of CUDA fails after an access out of bounds."""
    works = iter([None])
    lost = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def synchronize(device):
        if next(works, lost) is lost:
            raise lost

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    session = Session(torch.device("cuda"), tmp_path / "x.json", {"commit": "abc"}, minutes=1)
    for name in ("first", "second", "third"):
        session.add(f"question/{name}", lambda: {"status": "ok", "ms": 1.0})
    found = load(tmp_path / "x.json")["cells"]
    assert [found[f"question/{name}"]["status"] for name in ("first", "second", "third")] == [
        "ok", "failed", "not measured"
    ]  # fmt: skip
    assert "illegal memory access" in found["question/second"]["reason"]
    assert "question/second has ended" in found["question/third"]["reason"]


def test_parts_without_time_left_are_not_measured(tmp_path, call):
    for part in ("bias", "questions", "checks", "hardware", "layers", "ranks"):
        assert gpu.main([*call, "--only", part, "--minutes", "0"]) == 0, part
    found = cells(tmp_path)
    assert {cell["status"] for cell in found.values()} == {"not measured"}
    parts = {key.partition("/")[0] for key in found}
    assert parts == {"bias", "question", "checks", "hardware", "layers", "ranks"}


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_a_bias_is_measured_against_float64(case, monkeypatch):
    inputs = draw_case(CPU, (48, 301, 64), case, torch.bfloat16)
    logits = inputs.hidden_states.double() @ inputs.lm_head_weight.double().T
    assert logits.mean().item() == pytest.approx(case.offset, abs=case.std)
    assert logits.std().item() == pytest.approx(case.std, rel=0.3)
    cell = measure_bias(inputs, "bfloat16", AUTO, "auto")
    assert cell["rows_beyond_the_promise"] == 0
    assert cell["largest_error"] < 1e-4

    from benchmarks.gpu import bias

    true_logprob = bias.linear_logprob
    monkeypatch.setattr(bias, "linear_logprob", lambda *a, **k: true_logprob(*a, **k) - 3e-3)
    exact = measure_bias(inputs, "bfloat16", AUTO, "exact")
    assert exact["status"] == "failed"
    assert exact["reason"] == "48 of 48 rows are beyond the promise"
    cell = measure_bias(inputs, "bfloat16", AUTO, "auto")
    assert cell["status"] == "ok"  # a measurement
    assert cell["rows_beyond_the_promise"] == 48
    assert cell["mean_error"] == pytest.approx(-3e-3, rel=0.05)
    assert cell["sum_over_120"] == pytest.approx(-0.36, rel=0.05)


OUTPUT = """
tests/realign_kernels/backends/triton/test_rows.py::test_a[x-1] PASSED   [ 10%]
[gw1] [ 20%] FAILED tests/realign_kernels/backends/triton/test_rows.py::test_b[two words]
[gw0] [ 30%] SKIPPED tests/realign_kernels/test_group.py::test_c
[gw0] [ 40%] PASSED tests/realign_kernels/test_group.py::test_d
=================================== FAILURES ===================================
/x/tests/realign_kernels/backends/triton/test_rows.py:3: assert 2 == 1
=========================== short test summary info ============================
SKIPPED [1] tests/realign_kernels/test_group.py:4: no process group
FAILED tests/realign_kernels/backends/triton/test_rows.py::test_b[two words] - assert 2 == 1
"""


def test_pytest_results_become_one_cell_per_file():
    found = cells_of(OUTPUT, 1, is_whole=True)
    rows, group = found["tests/backends/triton/test_rows.py"], found["tests/test_group.py"]
    assert (rows["status"], rows["passed"], rows["failures"]) == (
        "failed",
        1,
        ["test_b[two words]"],
    )
    assert (group["status"], group["passed"], group["skipped"]) == ("ok", 1, 1)
    assert rows["reason"] == "1 failed, the first test_b[two words]"
    assert found["tests"]["status"] == "failed"

    absent = "ERROR tests/realign_kernels/compat/test_cce.py - ModuleNotFoundError: No module"
    found = cells_of(OUTPUT + absent, 1, is_whole=True)
    assert "not collected: ModuleNotFoundError" in found["tests/compat/test_cce.py"]["reason"]

    found = cells_of(OUTPUT, None, is_whole=False)
    assert found["tests"] == {
        "status": "not measured", "reason": "out of time after 2 tests had passed"
    }  # fmt: skip
    assert found["tests/backends/triton/test_rows.py"]["status"] == "failed"
    group = found["tests/test_group.py"]  # may have other tests that did not run
    assert (group["status"], group["passed"]) == ("not measured", 1)
    assert cells_of("no tests ran\n", 5, is_whole=True) == {
        "tests": {"status": "failed", "reason": "pytest exited with 5: no tests ran"}
    }


def test_an_interrupted_call_ends_its_test_process(tmp_path, monkeypatch):
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(native_tests, "command", lambda selected: waits)
    session = Session(CPU, tmp_path / "x.json", {"commit": "abc"}, minutes=10)
    native = NativeTests(session)
    with pytest.raises(KeyboardInterrupt), native:
        raise KeyboardInterrupt
    assert session.cells["tests"]["status"] == "not measured"
    assert native._process.poll() is not None


def test_tests_that_end_their_process_are_not_run_on_a_gpu():
    ignored = [part.partition("=")[2] for part in command() if part.startswith("--ignore=")]
    assert len(ignored) == 2
    assert all((ROOT / path).is_file() for path in ignored)


SANITIZER = """#!/usr/bin/env python3
import os, subprocess, sys
tool, command = sys.argv[2], sys.argv[3:]
if "benchmarks.gpu.planted" in command:
    print("========= ERROR SUMMARY: {planted} errors")
    sys.exit()
code = subprocess.run(command).returncode
print("========= Invalid __global__ write of size 4 bytes" if {found} else "")
if tool == "memcheck":
    print("========= ERROR SUMMARY: {found} errors")
else:
    print("========= RACECHECK SUMMARY: {found} hazards displayed ({found} errors, 0 warnings)")
"""


def fake_sanitizer(folder: Path, monkeypatch, **numbers: int) -> None:
    """Put a program on the PATH that says what the tool would."""
    path = folder / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    text = SANITIZER
    for name, number in numbers.items():
        text = text.replace(f"{{{name}}}", str(number))
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_missing_sanitizer_gives_unavailable_cells(tmp_path, call, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.main([*call, "--only", "sanitizer"]) == 0
    found = cells(tmp_path)
    assert found.keys() == {f"sanitizer/{name}" for name in ("planted", "memcheck", "racecheck")}
    assert {cell["status"] for cell in found.values()} == {"unavailable"}
    assert "not on the PATH" in found["sanitizer/memcheck"]["reason"]


@pytest.mark.full
@pytest.mark.parametrize("tool", sanitizer.TOOLS[1:])
def test_a_tool_runs_over_small_checks(tool, tmp_path, call, monkeypatch):
    fake_sanitizer(tmp_path, monkeypatch, planted=3, found=0)
    monkeypatch.setattr(sanitizer, "TOOLS", (tool,))
    assert gpu.main([*call, "--only", "sanitizer", "--minutes", "20"]) == 0
    found = cells(tmp_path)
    assert found["sanitizer/planted"]["errors"] == 3
    cell = found[f"sanitizer/{tool}"]
    assert (cell["status"], cell["errors"]) == ("ok", 0)
    assert cell["checks"] == cell["passed"] == 96


def test_a_sanitizer_that_misses_the_planted_access_fails(tmp_path, call, monkeypatch):
    fake_sanitizer(tmp_path, monkeypatch, planted=0, found=2)
    monkeypatch.setattr(sanitizer, "TOOLS", ())
    assert gpu.main([*call, "--only", "sanitizer", "--minutes", "5"]) == 1
    planted = cells(tmp_path)["sanitizer/planted"]
    assert planted["status"] == "failed"
    assert planted["reason"] == "the planted access was not found"


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended("compiling\n", None), "not measured"),
        (Ended("compiling\n", 1), "failed"),
        (Ended("========= ERROR SUMMARY: 0 errors", 0), "failed"),
        (Ended("========= ERROR SUMMARY: 3 errors", 1), "ok"),
    ],
)
def test_a_planted_access_without_time_left_is_not_measured(
    ended, status, tmp_path, call, monkeypatch
):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda command: command)
    monkeypatch.setattr(sanitizer, "TOOLS", ())
    monkeypatch.setattr(sanitizer, "run_command", lambda *_: ended)
    assert gpu.main([*call, "--only", "sanitizer"]) == (status == "failed")
    assert cells(tmp_path)["sanitizer/planted"]["status"] == status


def test_a_file_half_written_by_a_child_process_is_ignored(tmp_path, call, monkeypatch):
    def run_command(command, seconds, settings):
        folder = Path(command[command.index("--out") + 1]) if "--out" in command else tmp_path
        merge(folder / "gpu_x.json", {"commit": "abc"}, {"checks/a": {"status": "ok"}})
        (folder / "gpu_x.part").write_text('{"runs": {"1"')
        return Ended("", None)

    monkeypatch.setattr(sanitizer.shutil, "which", lambda command: command)
    monkeypatch.setattr(sanitizer, "run_command", run_command)
    assert gpu.main([*call, "--only", "sanitizer"]) == 0
    cell = cells(tmp_path)["sanitizer/memcheck"]
    assert cell["status"] == "not measured"
    assert cell["reason"] == "out of time after 1 of 96 checks"


CHILDREN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0, 600])
def test_ending_a_command_ends_its_child_processes(seconds):
    script = [sys.executable, "-c", CHILDREN.format(seconds=seconds)]
    with subprocess.Popen(
        script, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        child = int(process.stdout.readline())
        assert has_ended(process, 60 - seconds) == (seconds == 0)
    wait_until(lambda: not is_running(child), 10)


def test_a_command_returns_its_output_and_exit_code():
    script = "import os, sys; print(os.environ['X_SETTING']); sys.exit(3)"
    assert run_command([sys.executable, "-c", script], 60, {"X_SETTING": "on"}) == ("on\n", 3)
    assert run_command([sys.executable, "-c", "import time; time.sleep(600)"], 0, {}).code is None


def test_sanitizer_findings_become_a_cell():
    found = "========= Invalid write of 4 bytes\n=========   at _epilogue\n"
    text = f"========= COMPUTE-SANITIZER\n{found}========= ERROR SUMMARY: 1 error\n"
    whole = ["ok"] * 10
    cell = sanitizer.cell_of(Ended(text, 1), whole, 10)
    assert (cell["status"], cell["errors"]) == ("failed", 1)
    assert "Invalid write of 4 bytes" in cell["reason"]
    races = "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    assert sanitizer.cell_of(Ended(races, 0), whole, 10)["errors"] == 2
    crashed = sanitizer.cell_of(Ended("Device not supported\n", 1), [], 10)
    assert (crashed["status"], crashed["reason"]) == ("failed", "Device not supported")


@pytest.mark.parametrize(
    ("statuses", "code", "status"),
    [
        (["ok"] * 10, 0, "ok"),
        (["ok"] * 9, 0, "not measured"),
        (["ok"] * 9 + ["not measured"], 0, "not measured"),
        (["ok"] * 9 + ["failed"], 1, "failed"),
        (["failed"] + ["not measured"] * 9, 1, "failed"),
        (["failed"], None, "failed"),
        (["ok"] * 4, None, "not measured"),
        ([], 0, "failed"),
    ],
)
def test_a_sanitizer_tool_passes_only_if_all_its_checks_passed(statuses, code, status):
    clean = "========= ERROR SUMMARY: 0 errors" if code is not None else "half"
    cell = sanitizer.cell_of(Ended(clean, code), statuses, 10)
    assert cell["status"] == status
    assert (cell["checks"], cell["passed"]) == (10, statuses.count("ok"))


def test_speed_aims_are_compared_with_measurements():
    assert [aim_of(1024, size, "frozen") for size in (4096, 3584, 2560, 1024)] == [
        2.3, 2.3, 2.5, None
    ]  # fmt: skip
    assert aim_of(256, 4096, "frozen") is None
    size = {"N": 1024, "D": 4096, "status": "ok"}
    few = {"N": 256, "D": 4096, "status": "ok"}
    group = "head/token/bfloat16/llava-1.5-7b"
    found = {
        f"{group}/N1024/frozen/ours": {**size, "ms": 2.0, "ratio_to_gemm": 2.2},
        f"{group}/N1024/frozen/trl": {**size, "ms": 3.0, "ratio_to_gemm": 3.3},
        f"{group}/N1024/trainable/ours": {**size, "ms": 4.0, "ratio_to_gemm": 4.4},
        f"{group}/N256/frozen/ours": {**few, "ms": 2.0, "ratio_to_gemm": 9.0},
        f"{group}/N256/frozen/torch_logits": {**few, "ms": 2.5, "ratio_to_gemm": 9.5},
    }
    lines = [line.split() for line in aims_table(found, "bfloat16").splitlines()[1:]]
    assert lines == [
        ["llava-1.5-7b,", "256,", "frozen", "9.00", "yes"],
        ["llava-1.5-7b,", "1024,", "frozen", "2.20", "2.3", "yes", "trl", "1.50x", "ours"],
        ["llava-1.5-7b,", "1024,", "trainable", "4.40", "3.4", "no"],
    ]
