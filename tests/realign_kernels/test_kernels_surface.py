"""The public surface, the choice of backends, and the cut into tiles."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import realign_kernels
from realign_kernels import (
    LogprobStats,
    Objective,
    PreferenceOutput,
    RdpoOutput,
    RdpoStatsOutput,
    Term,
    describe_backends,
    diagnose,
    linear_logprob,
    linear_logprob_stats,
    preference_loss,
    rdpo_loss,
    shift_labels,
    stack_cells,
)
from realign_kernels.tiling import TileShape, fitted, spans, tile_shape

HEAD = (
    "*, lm_head_bias=None, lm_head_lora=None, ignore_index=-100, logit_scale=1.0, "
    "logit_softcap=None, temperature=1.0, backend='auto', memory='auto', "
    f"workspace_bytes={256 << 20}, stash_bytes={2 << 30}, accumulate='auto', group=None"
)
SCORES = HEAD.replace("group", "num_scored=None, group")
SIGNATURES = {
    linear_logprob: f"(hidden_states, lm_head_weight, labels, {SCORES})",
    linear_logprob_stats: f"(hidden_states, lm_head_weight, labels, {SCORES})",
    rdpo_loss: "(hidden_states, lm_head_weight, labels, ref_logps, *, sequence_ids=None, "
    "sequence_lengths=None, beta=0.1, image_beta=None, image_weight=1.0, objective=None, "
    "rejected_scoring='label', token_weights=None, statistics=False, "
    + HEAD.removeprefix("*, ")
    + ")",
    preference_loss: "(logps, ref_logps, objective, *, num_tokens=None)",
    Objective: "(terms, nll_weight=0.0)",
    Term: "(coefficients, weight=1.0, beta=0.1, offset=0.0, link='logsigmoid', "
    "label_smoothing=0.0, normalize='none')",
    Objective.dpo: "(beta=0.1)",
    Objective.rdpo: "(beta=0.1, image_beta=None, image_weight=1.0)",
    Objective.mdpo: "(beta=0.1, image_beta=None, image_weight=1.0, anchor_weight=1.0, "
    "anchor_offset=0.0)",
    Objective.symmetric: "(beta=0.1, image_beta=None, image_weight=1.0)",
    describe_backends: "()",
    diagnose: "()",
    shift_labels: "(labels, is_answer=None, *, ignore_index=-100, allow_absent=False)",
    stack_cells: "(chosen, text_rejected, image_rejected=None, both_rejected=None, *, "
    "padding_value=None)",
}
FIELDS = {
    LogprobStats: "token_logps entropy log_sum_sq_probs mean_logits is_top1 top_non_label_logps "
    "top_non_label_ids lse",
    RdpoOutput: "loss logps num_tokens rewards text_margins image_margins",
    RdpoStatsOutput: "loss logps num_tokens rewards text_margins image_margins entropy mean_logits "
    "top1_rate",
    PreferenceOutput: "loss losses rewards text_margins image_margins",
}
PACKAGE = Path(realign_kernels.__file__).parent


def test_dunder_all_lists_the_public_names():
    assert realign_kernels.__all__ == [
        "CELL_NAMES",
        "LogprobStats",
        "Objective",
        "PreferenceOutput",
        "RdpoOutput",
        "RdpoStatsOutput",
        "Term",
        "describe_backends",
        "diagnose",
        "linear_logprob",
        "linear_logprob_stats",
        "preference_loss",
        "rdpo_loss",
        "shift_labels",
        "stack_cells",
    ]
    assert all(hasattr(realign_kernels, name) for name in realign_kernels.__all__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_the_signature_equals_the_documented_one(function):
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == SIGNATURES[function]


@pytest.mark.parametrize("output", FIELDS, ids=lambda output: output.__name__)
def test_results_have_the_documented_fields(output):
    assert " ".join(output._fields) == FIELDS[output]


@pytest.mark.parametrize(
    "function", [linear_logprob, linear_logprob_stats, rdpo_loss, preference_loss]
)
def test_docstrings_name_every_argument(function):
    lines = [line.strip() for line in inspect.getdoc(function).splitlines()]
    for name in inspect.signature(function).parameters:
        assert any(line.startswith(f"{name}: ") for line in lines), name
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in lines


def test_importing_the_package_requires_only_torch():
    blocked = ("triton", "transformers", "numpy", "safetensors", "realign")
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        "import realign_kernels\n"
        "realign_kernels.Objective.rdpo()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)


def test_every_module_imports_without_trainer_libraries():
    """The environment of another trainer may have any version of transformers, or none."""
    absent = ["transformers", "trl", "peft", "accelerate", "datasets", "liger_kernel", "verl"]
    absent += ["cut_cross_entropy", "swift", "llamafactory", "numpy", "safetensors", "realign"]
    files = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    # Triton's kernels are loaded at the first call on a GPU.
    modules = [name for name in modules if not name.startswith("realign_kernels.backends.triton")]
    assert len(modules) > 25
    code = (
        "import sys\n"
        f"for name in {absent}: sys.modules[name] = None\n"
        f"for name in {modules}: __import__(name)\n"
        "import realign_kernels, torch\n"
        "hidden_states = torch.zeros(6, 2, 4, requires_grad=True)\n"
        "labels = torch.zeros(6, 2, dtype=torch.long)\n"
        "output = realign_kernels.rdpo_loss(hidden_states, torch.ones(5, 4), labels, None)\n"
        "output.loss.backward()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)


def test_backends_are_described():
    descriptions = describe_backends()
    assert list(descriptions) == ["auto", "eager", "triton", "cpu"]
    assert descriptions["auto"].startswith("cpu on CPUs, ")
    for name in ("eager", "cpu"):
        assert descriptions[name].startswith("available: ")


def test_a_missing_backend_is_described(monkeypatch):
    monkeypatch.setattr("realign_kernels.backends.dispatch._missing", lambda name: "no compiler")
    descriptions = describe_backends()
    assert descriptions["auto"] == "eager on CPUs, eager on GPUs"
    assert descriptions["cpu"] == "not installed (no compiler): fused C++ kernels for CPUs"


def shape_of(hidden_size, rank, itemsize, workspace_bytes, largest=(1024, 4096)):
    return tile_shape(
        TileShape(*largest), hidden_size, rank, (itemsize,) * 3, workspace_bytes,
        temporaries=2, casts_head=True, sums_head_gradient=True,
    )  # fmt: skip


def scratch_of(shape, hidden_size, rank, itemsize):
    """Logits and two temporaries, the cast head with its gradient, and the factor B twice."""
    per_column = 2 * rank + hidden_size + (hidden_size + rank + 1)
    return shape.columns * (3 * shape.rows + per_column) * itemsize


@pytest.mark.parametrize("hidden_size", [1, 64, 4096, 8192])
@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("workspace_bytes", [10 << 20, 64 << 20, 256 << 20, 1 << 30])
def test_tiles_fill_the_workspace_without_exceeding_it(
    hidden_size, rank, itemsize, workspace_bytes
):
    shape = shape_of(hidden_size, rank, itemsize, workspace_bytes)
    used = scratch_of(shape, hidden_size, rank, itemsize)
    assert used <= workspace_bytes
    assert shape == (1024, 4096) or 2 * used > workspace_bytes / 2
    assert shape.rows in (1024, 512, 256, 128, 64)


def test_the_largest_tile_is_used_where_it_fits():
    assert shape_of(64, 0, 4, 1 << 30) == (1024, 4096)
    assert shape_of(64, 0, 4, 1 << 30, largest=(7, 300)) == (7, 300)


def test_few_rows_get_wider_tiles_grouped_by_powers_of_two():
    largest = TileShape(4096, 8192)
    assert fitted(largest, 0) == fitted(largest, 1) == fitted(largest, 64) == (64, 1 << 19)
    assert fitted(largest, 65) == fitted(largest, 128) == (128, 1 << 18)
    assert fitted(largest, 1025) == fitted(largest, 2048) == (2048, 16384)
    assert fitted(largest, 4096) == fitted(largest, 10**6) == largest
    assert fitted(TileShape(4, 8), 1) == (4, 8)


def test_the_smallest_workspace_holds_one_logit():
    least = (3 + 2 * 65) * 4
    assert shape_of(64, 0, 4, least) == TileShape(1, 1)
    with pytest.raises(ValueError, match=f"workspace_bytes must be >= {least} .* got {least - 1}"):
        shape_of(64, 0, 4, least - 1)


@pytest.mark.parametrize("total", [0, 1, 4, 5, 8, 11])
def test_spans_cover_every_index_once(total):
    covered = [index for span in spans(total, 4) for index in range(span.start, span.stop)]
    assert covered == list(range(total))
