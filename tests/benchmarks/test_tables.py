"""The logic of the benchmarks: merging of files, tables, and reasons why peers are absent."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.head import accuracy, cpu, providers  # noqa: E402
from benchmarks.head import tables as head_tables  # noqa: E402
from benchmarks.head.row_classes import ROW_CLASSES, make_rows  # noqa: E402
from benchmarks.measure import exact, interleave, peak_bytes, quantile, summary  # noqa: E402
from benchmarks.result_files import environment, is_current, load, merge  # noqa: E402
from benchmarks.retrieval.table import retrieval_block  # noqa: E402
from benchmarks.shapes import HeadShape, make_inputs, shapes_for  # noqa: E402
from realign_kernels.testing import HeadInputs, dense_logprob  # noqa: E402

CPU = torch.device("cpu")
TINY = HeadShape("tiny", 40, 24, 97)


def run_of(commit: str) -> dict:
    return environment(CPU, commit) | {"command": "test"}


def test_results_of_calls_merge_and_an_absent_result_replaces_no_measurement(tmp_path):
    path = tmp_path / "deep" / "gpu_x.json"
    absent = {"status": "not measured", "reason": "out of time"}
    merge(path, run_of("one"), {"a": {"status": "ok", "ms": 1.0}, "b": absent})
    content = merge(path, run_of("two"), {"a": absent, "b": {"status": "ok", "ms": 2.0}})
    assert {key: cell.get("ms") for key, cell in content["cells"].items()} == {"a": 1.0, "b": 2.0}
    commits = {
        key: content["runs"][cell["run"]]["commit"] for key, cell in content["cells"].items()
    }
    assert commits == {"a": "one", "b": "two"}

    content = merge(path, run_of("two"), {"a": {"status": "failed", "reason": "wrong"}})
    assert content["cells"]["a"]["status"] == "failed"
    assert [run["commit"] for run in content["runs"].values()] == ["two"]  # unused runs go
    assert load(path) == content == json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["gpu_x.json"]


@pytest.mark.parametrize(
    ("commit", "now", "expected"),
    [("one", "one", True), ("one", "two", False), ("one+", "one+", False)],
)
def test_a_cell_is_measured_once_for_each_commit(tmp_path, commit, now, expected):
    content = merge(tmp_path / "x.json", run_of(commit), {"a": {"status": "ok"}})
    assert is_current(content, "a", run_of(now)) is expected
    assert not is_current(content, "b", run_of(now))


def test_an_absent_peer_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    reason = providers.why_not(providers.PROVIDERS["trl"], CPU, torch.float32)
    assert reason == "trl is not installed"


def test_a_peer_that_needs_a_gpu_or_raises_gives_the_reason(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())
    quack = providers.PROVIDERS["quack"]
    assert "needs a GPU for this" in providers.why_not(quack, CPU, torch.float32)

    def fails(*_):
        raise RuntimeError("no driver\nand more")

    broken = providers.Provider(name="broken", score=fails, flops=providers.Flops(2, 4, 6))
    assert providers.why_not(broken, CPU, torch.float32) == "RuntimeError: no driver"


@pytest.mark.parametrize("name", ["ours", "eager_ours", "torch_logits"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_providers_and_the_oracle_agree_with_autograd(name, softcap):
    inputs = make_inputs(TINY, "token", torch.float64, CPU)._replace(logit_softcap=softcap)
    truth = exact(inputs, "token", rows=16)
    options = {"logit_softcap": softcap}
    leaves = HeadInputs(*inputs[:3], options).as_leaves()
    dense_logprob(leaves).backward(inputs.grad_token_logps)
    torch.testing.assert_close(truth.grad_hidden, leaves.hidden_states.grad)
    torch.testing.assert_close(truth.grad_weight, leaves.lm_head_weight.grad)

    result = providers.PROVIDERS[name].run("trainable", inputs)
    torch.testing.assert_close(result, truth.result)
    torch.testing.assert_close(inputs.hidden_states.grad, truth.grad_hidden)
    torch.testing.assert_close(inputs.lm_head_weight.grad, truth.grad_weight)
    providers.PROVIDERS[name].run("frozen", inputs)
    assert inputs.lm_head_weight.grad is None


@pytest.mark.parametrize("name", ["ours_mean", "ours_dpo", "torch_dpo"])
def test_whole_losses_agree_with_the_oracle(name):
    provider = providers.PROVIDERS[name]
    inputs = make_inputs(TINY, provider.job, torch.float32, CPU)
    truth = exact(inputs, provider.job)
    result = provider.run("trainable", inputs)
    assert abs(result.item() - truth.result.item()) < 1e-5
    grad = inputs.hidden_states.grad.view(truth.grad_hidden.shape).double()
    torch.testing.assert_close(grad, truth.grad_hidden, atol=1e-6, rtol=1e-4)


def test_row_classes_have_the_probabilities_in_their_names():
    assert {"confident", "unlikely"} <= {*ROW_CLASSES}
    for name in ROW_CLASSES:
        inputs = make_rows(name, 64, 128, 500, torch.float64)
        logps = exact(inputs, "token").result
        if name == "confident":
            assert (-torch.expm1(logps)).min() > 0.9e-7
            assert (-torch.expm1(logps)).max() < 1.1e-3
        if name == "unlikely":
            assert logps.max() < -19.9
            assert logps.min() > -70.1


def test_peak_memory_counts_allocations_of_custom_operators():
    def call():
        scratch = torch.empty(1 << 20, dtype=torch.uint8)
        del scratch
        return torch.empty(3 << 20, dtype=torch.uint8)

    assert peak_bytes(call, CPU) == 3 << 20
    inputs = make_inputs(HeadShape("x", 64, 32, 4096), "token", torch.float32, CPU)
    peak = peak_bytes(lambda: providers.PROVIDERS["torch_logits"].run("forward", inputs), CPU)
    assert peak >= 2 * 64 * 4096 * 4  # logits and their log-softmax


def test_timing_alternates_and_ends():
    order = []
    ours, gemm = interleave(
        lambda: order.append("b"), lambda: order.append("a"), CPU, seconds=0.0, repeats=7
    )
    assert "".join(order) == "ab" * 2 + "abba" * 2  # the first two are not counted
    assert len(ours) == len(gemm) == 4
    assert summary([3.0, 1.0, 2.0])["ms"] == 2.0
    assert math.isnan(quantile(torch.tensor([1.0, math.nan]), 0.5))


def test_tables_show_every_provider_and_hide_speeds_of_a_busy_machine(tmp_path):
    assert "not been measured yet" in head_tables.head_block(tmp_path)
    cells = accuracy.measure(
        CPU, ["float32"], ["ordinary", "confident"], ["ours", "liger_flce"],
        num_rows=32, hidden_size=64, vocabulary=300,
    )  # fmt: skip
    sizes = {"num_rows": 32, "hidden_size": 64, "vocabulary": 300}
    merge(tmp_path / "accuracy_cpu.json", run_of("abc") | sizes, cells)
    cell = {
        "status": "ok", "ms": 12.0, "ratio_to_gemm": 2.5, "peak_bytes": 1 << 20,
        "errors": {"logp_max": 2.34e-6, "grad_hidden": 1e-7}, **TINY._asdict(),
    }  # fmt: skip
    calibration = {"status": "ok", "is_busy": False}
    key = "head/token/float32/tiny/N40/{}/{}"
    absent = {"status": "unavailable", "reason": "trl is not installed"}
    speeds = {key.format(mode, "ours"): cell for mode in providers.MODES}
    speeds |= {key.format(mode, "trl"): absent for mode in providers.MODES}
    path = tmp_path / "cpu_head.json"
    merge(path, run_of("abc"), speeds | {"calibration": calibration})

    block = head_tables.head_block(tmp_path)
    assert "| liger_flce | liger-kernel" in block
    assert "| **ours** | 12 (2.50x) | 12 (2.50x) | 12 (2.50x) | 1 / 1 / 1 | 2.3e-6 |" in block
    assert "| trl | trl is not installed |" in block
    assert "have not run on a GPU yet" in block

    merge(path, run_of("abc"), {"calibration": calibration | {"is_busy": True}})
    assert "(2.50x)" not in head_tables.head_block(tmp_path)

    gpu_cells = {k.replace("/float32/", "/bfloat16/"): c for k, c in speeds.items()}
    merge(tmp_path / "gpu_nvidia-x.json", run_of("abc"), gpu_cells)
    block = head_tables.head_block(tmp_path)
    assert "| tiny, 40 tokens, bfloat16 | frozen head | 12 (2.50x) | 2.3e-6 | - |" in block
    assert "have not run on a GPU yet" not in block


def test_the_retrieval_table_names_its_last_run(tmp_path):
    cell = {
        "status": "ok", "images": 10, "ms": 1.0, "faiss_flat": {"ms": 1.0},
        "ratio_to_faiss_flat": 1.0, "recall": 1.0, "process_peak_over_vectors": 1.0,
    }  # fmt: skip
    for number in range(1, 11):  # as text, "10" sorts before "9"
        cells = {f"retrieval/{number}/float32/8": cell}
        merge(tmp_path / "cpu_retrieval.json", run_of(f"run{number}") | {"faiss": "1"}, cells)
    assert "at run10," in retrieval_block(tmp_path)


def test_a_busy_machine_is_noticed():
    assert not cpu.was_busy(0.1, [230.0, 240.0], None)
    assert cpu.was_busy(2.0, [230.0, 240.0], None)
    assert cpu.was_busy(0.1, [230.0, 300.0], None)
    assert not cpu.was_busy(2.0, [230.0, 240.0], 230.0)
    assert cpu.was_busy(0.1, [400.0, 400.0], 230.0)


def test_shapes_of_a_cpu_keep_the_vocabulary():
    assert {shape.V for shape in shapes_for("cpu")} == {32064}
    assert {shape.N for shape in shapes_for("cuda")} == {256, 1024, 4096, 16384}
