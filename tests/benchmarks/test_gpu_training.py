"""Comparisons of the script for GPUs: layers of other packages, and several ranks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import layers, ranks  # noqa: E402
from benchmarks.gpu.session import Session  # noqa: E402
from benchmarks.result_files import load  # noqa: E402
from realign.errors import RefusedError  # noqa: E402
from realign.modeling.acceleration import Numerics  # noqa: E402
from realign.modeling.packed_attention import PackedAttention  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models with their batches, by shape."""
    folders = {name: tmp_path_factory.mktemp(name) for name in layers.SHAPES}
    return {name: (folder, layers.save_model(name, folder)) for name, folder in folders.items()}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks for one
def test_compiled_layers_are_those_of_sdpa(saved):
    cell = layers.compare(*saved["small"], "compiled", CPU)
    assert cell["status"] == "ok", cell
    assert cell["parameters_compared"] > 40


@pytest.mark.parametrize("name", layers.SHAPES)
def test_equal_layers_differ_by_rounding_alone(name, saved, monkeypatch):
    monkeypatch.setattr(layers, "compile_layers", lambda model, kind: None)
    cell = layers.compare(*saved[name], "compiled", CPU)
    assert cell["status"] == "ok", cell
    assert 0 < cell["gradient_error"] < 0.05  # of bfloat16
    assert cell["parameters_compared"] > 40


def test_a_mask_that_hides_a_prefix_token_is_detected(saved, monkeypatch):
    """The fault is in the variant alone: later answers do not see the last token of the prefix."""
    make_mask = PackedAttention._make_mask
    is_wrong = []

    def wrong(self, sees, row, answer, device):
        mask = make_mask(self, sees, row, answer, device)
        if is_wrong and mask is not None:
            mask = mask.clone()
            mask[:, row.prefix - 1] = False
        return mask

    monkeypatch.setattr(PackedAttention, "_make_mask", wrong)
    monkeypatch.setattr(layers, "compile_layers", lambda model, kind: setattr(model, "wrong", True))
    score = layers.score

    def scored(model, *arguments):
        is_wrong[:] = [True] if hasattr(model, "wrong") else []
        return score(model, *arguments)

    monkeypatch.setattr(layers, "score", scored)
    cell = layers.compare(*saved["small"], "compiled", CPU)
    assert cell["status"] == "failed", cell


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("liger", "liger: true requires"),
        ("flash", "attention: flash requires"),
        ("nf4", "quantization: nf4 requires"),
    ],
)
def test_a_missing_package_is_an_unavailable_cell_with_its_reason(variant, reason, saved):
    cell = layers.compare(*saved["small"], variant, CPU)
    assert cell["status"] == "unavailable"
    assert cell["reason"].startswith(reason)


def test_a_package_that_does_not_fit_the_model_is_a_cell_with_its_reason(saved, monkeypatch):
    """The fault is found when the variant is loaded, after models that it could have changed."""
    true_load, loaded = layers.load_model, []

    def load_model(folder, numerics):
        loaded.append(numerics)
        if isinstance(numerics, Numerics):
            raise RefusedError("liger: true requires a liger-kernel that fits.")
        return true_load(folder, numerics)

    monkeypatch.setattr(layers, "load_model", load_model)
    monkeypatch.setattr(Numerics, "check", lambda self: None)
    cell = layers.compare(*saved["small"], "liger, float32", CPU)
    assert cell["status"] == "unavailable"
    assert cell["reason"] == "liger: true requires a liger-kernel that fits."
    assert loaded == [torch.float64, torch.float32, layers.VARIANTS["liger, float32"]]


@pytest.mark.full
def test_four_bit_layers_are_compared_with_their_dequantized_weights(saved, monkeypatch):
    """Stand-ins have weights that the model keeps rounded, and that its copies must get."""
    rounded = {"model.language_model.layers.0.mlp.up_proj.weight": 64}
    true_load = layers.load_model

    def load_model(folder, numerics):
        model = true_load(folder, Numerics(torch.bfloat16) if is_variant(numerics) else numerics)
        if is_variant(numerics):
            with torch.no_grad():
                for name, steps in rounded.items():
                    weight = model.get_parameter(name)
                    weight.copy_((weight * steps).round() / steps)
        return model

    def is_variant(numerics):
        return isinstance(numerics, Numerics) and numerics.quantization == "nf4"

    monkeypatch.setattr(layers, "load_model", load_model)
    monkeypatch.setattr(Numerics, "check", lambda self: None)
    far = layers.compare(*saved["small"], "nf4", CPU)
    assert far["status"] == "failed"  # nothing says which weights they are
    monkeypatch.setattr(
        layers,
        "dequantized",
        lambda model: {name: model.get_parameter(name).detach().clone() for name in rounded},
    )
    near = layers.compare(*saved["small"], "nf4", CPU)
    assert near["status"] == "ok", near
    assert near["parameters_compared"] < far["parameters_compared"]


def write(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("off", "status"), [(1e-4, "ok"), (0.1, "failed"), (float("nan"), "failed")]
)
def test_weights_are_compared_relative_to_their_change_in_training(tmp_path, off, status):
    before = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    trained = before + 1e-3  # a wrong result would be near in absolute numbers too
    write(tmp_path / "model", {"w": before})
    write(tmp_path / "alone" / "checkpoint", {"w": trained})
    run = ranks.RUNS[2]
    write(tmp_path / run.name / "checkpoint", {"w": trained + off * 1e-3})
    cell = ranks.compared(tmp_path, run)
    assert cell["status"] == status
    assert cell["distance"] == pytest.approx(off, rel=0.1, nan_ok=True)
    with pytest.raises(ValueError, match=r"weights differ by name: \['v', 'w'\]"):
        ranks.distance({"w": before}, {"v": before})


def test_runs_that_cannot_start_give_the_reason(monkeypatch):
    runs = {run.name: run for run in ranks.RUNS}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ranks.why_not(runs["zero3, 2 processes"], CPU) == "deepspeed is not installed"
    assert ranks.why_not(runs["fsdp2, 2 processes"], CPU) is None
    assert "GPUs alone" in ranks.why_not(runs["fsdp2, 1 process"], CPU)
    for run in ranks.RUNS:
        assert run.compared_with in runs
        names = [name for name in ranks.command(Path("x"), run) if name.endswith(".yaml")]
        assert all(Path(name).is_file() for name in names)
        assert len(names) == (run.preset is not None)


def test_a_baseline_run_starts_once_for_all_comparisons(tmp_path, monkeypatch):
    started = []

    def train(folder, run, session):
        started.append(run.name)
        return {"status": "failed", "reason": f"{run.name}: no memory"}

    monkeypatch.setattr(ranks, "_train", train)
    monkeypatch.setattr(ranks, "write_inputs", lambda folder, shape: None)
    monkeypatch.setattr(ranks, "why_not", lambda run, device: None)
    session = Session(CPU, tmp_path / "x.json", {"commit": "abc"}, minutes=1)
    ranks.compare_ranks(session)
    assert started == ["alone", "alone, bfloat16", "zero2, 1 process"]
    reasons = {name.partition("/")[2]: cell["reason"] for name, cell in session.cells.items()}
    assert reasons["alone"] == reasons["fsdp2, 2 processes"] == "alone: no memory"


def test_the_error_of_a_run_is_read_from_its_output():
    text = "loading\nrealign: train.dtype must be bfloat16.\n"
    end = "subprocess.CalledProcessError: Command died.\n"
    assert ranks.error_of(text + end) == "realign: train.dtype must be bfloat16."
    assert ranks.error_of("step\nRuntimeError: no gloo\n" + end) == "RuntimeError: no gloo"
    assert ranks.error_of("") == "it said nothing"


@pytest.mark.slow
def test_two_processes_of_the_command_line_train_like_one_process(tmp_path, capsys):
    call = ["--device", "cpu", "--only", "ranks", "--minutes", "15", "--out", str(tmp_path)]
    assert gpu.main([*call, "--commit", "abc"]) == 0
    found = load(tmp_path / "gpu_cpu.json")["cells"]
    two = found["ranks/fsdp2, 2 processes"]
    assert two["status"] == "ok"
    assert two["distance"] < 1e-3
    assert two["moved"] > 1e-3
    assert found["ranks/zero2, 1 process"]["status"] == "unavailable"
