"""Every refusal of the tensor functions, matched by its message."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from realign_kernels import Objective, linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.backends.dispatch import auto_backend, resolve_backend
from realign_kernels.testing import make_head_inputs

pytestmark = pytest.mark.usefixtures("each_backend")

N, V, D = 6, 11, 4
BOTH = pytest.mark.parametrize("function", [linear_logprob, linear_logprob_stats])


def call(function, **changes):
    arguments = {
        "hidden_states": torch.zeros(N, D),
        "lm_head_weight": torch.zeros(V, D),
        "labels": torch.zeros(N, dtype=torch.int64),
        **changes,
    }
    return function(**arguments)


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_states": torch.zeros(())},
            r"hidden_states must have shape \(\.\.\., D\) with D >= 1, got \(\)",
        ),
        (
            {"lm_head_weight": torch.zeros(D, V)},
            r"lm_head_weight must have shape \(V, 4\) with V >= 1 to match .*, got \(4, 11\)",
        ),
        ({"lm_head_weight": torch.zeros(D)}, r"lm_head_weight must have shape .* got \(4,\)"),
        ({"lm_head_weight": torch.zeros(0, D)}, r"with V >= 1 .* got \(0, 4\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must have shape \(6,\) .* \(5,\)"),
        ({"lm_head_bias": torch.zeros(D)}, r"lm_head_bias must have shape \(11,\) .* got \(4,\)"),
        (
            {"lm_head_lora": (torch.zeros(2, V), torch.zeros(V, 2), 1.0)},
            r"lm_head_lora\[0\] must have shape \(2, 4\) .* got \(2, 11\)",
        ),
        (
            {"lm_head_lora": (torch.zeros(2, D), torch.zeros(V, 3), 1.0)},
            r"lm_head_lora\[1\] must have shape \(11, 2\) .* got \(11, 3\)",
        ),
        (
            {"lm_head_lora": (torch.zeros(2, D), torch.zeros(V, 2))},
            r"lm_head_lora must be \(A, B, scaling\), got 2 values",
        ),
        (
            {"lm_head_weight": torch.zeros(V, D, device="meta")},
            "lm_head_weight must be on cpu .* got meta. A meta tensor holds no values: load them",
        ),
        (
            {"hidden_states": torch.zeros(N, D, device="meta")},
            "hidden_states must hold values, got a meta tensor",
        ),
        (
            {"lm_head_bias": torch.zeros(V, device="meta")},
            "lm_head_bias must be on cpu .* got meta",
        ),
        (
            {"hidden_states": torch.zeros(N, 0), "lm_head_weight": torch.zeros(V, 0)},
            r"hidden_states must have shape \(\.\.\., D\) with D >= 1, got \(\d+, 0\)",
        ),
        ({"labels": torch.zeros(N, dtype=torch.int64, device="meta")}, "labels must be on cpu"),
        ({"logit_scale": 0.0}, "logit_scale must be finite and > 0, got 0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap must be finite and > 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and > 0, got nan"),
        ({"logit_scale": 10**309}, "logit_scale must be finite and > 0, got 1000"),
        ({"workspace_bytes": -1}, "workspace_bytes must be >= 0, got -1"),
        ({"stash_bytes": -1}, "stash_bytes must be >= 0, got -1"),
        ({"workspace_bytes": 20}, r"workspace_bytes must be >= \d+ to hold one logit .* got 20"),
        (
            {"backend": "cuda"},
            r"backend must be one of \['auto', 'eager', 'triton', 'cpu'\], got 'c",
        ),
        ({"memory": "none"}, r"memory must be one of \['auto', 'stash', 'tile', 'recompute'\]"),
        ({"memory": "tile"}, r"memory must be 'auto', 'stash' or 'recompute' .* call rdpo_loss"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_invalid_values_are_refused(function, changes, message):
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_states": torch.zeros(N, D).int()},
            r"hidden_states must be one of .* torch.int32",
        ),
        (
            {"lm_head_weight": torch.zeros(V, D).cfloat()},
            "lm_head_weight must be one of .*complex64",
        ),
        (
            {"lm_head_weight": torch.zeros(V, D).double()},
            "lm_head_weight must have dtype torch.float32 .* got torch.float64. Cast one of them",
        ),
        (
            {"labels": torch.zeros(N, dtype=torch.int32)},
            "labels must be torch.int64, got torch.int32",
        ),
        (
            {"lm_head_bias": torch.zeros(V).half()},
            r"lm_head_bias must be one of \['torch.float32'\]",
        ),
        ({"lm_head_bias": torch.zeros(V).double()}, "lm_head_bias must be .* got torch.float64"),
        (
            {"lm_head_lora": (torch.zeros(2, D), torch.zeros(V, 2).half(), 1.0)},
            r"lm_head_lora\[1\] must be one of \['torch.float32'\], got torch.float16",
        ),
    ],
)
def test_invalid_dtypes_are_refused(function, changes, message):
    with pytest.raises(TypeError, match=message):
        call(function, **changes)


def test_autocast_accepts_mixed_dtypes_but_not_float64():
    half = torch.zeros(V, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(linear_logprob, lm_head_weight=half, lm_head_bias=torch.zeros(V).half())
        with pytest.raises(TypeError, match=r"must have dtype torch.float64 .* got torch.bfloat16"):
            call(linear_logprob, hidden_states=torch.zeros(N, D).double(), lm_head_weight=half)
        with pytest.raises(TypeError, match=r"lm_head_bias must be one of .* got torch.float64"):
            call(linear_logprob, lm_head_weight=half, lm_head_bias=torch.zeros(V).double())


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@BOTH
def test_backends_that_are_not_installed_never_fall_back(function, backend, monkeypatch):
    monkeypatch.setattr(
        "realign_kernels.backends.dispatch._missing", lambda name: "it is not there"
    )
    with pytest.raises(
        RuntimeError, match=rf"got '{backend}': it is not there\. Pass backend='auto' or"
    ):
        call(function, backend=backend)


@BOTH
def test_backends_of_another_device_never_fall_back(function, monkeypatch):
    monkeypatch.setattr("realign_kernels.backends.dispatch._missing", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"must fit the device 'cpu' .*, got 'triton'"):
        call(function, backend="triton")
    assert resolve_backend("triton", "cuda") == "triton"
    with pytest.raises(RuntimeError, match=r"must fit the device 'cuda' .*, got 'cpu'"):
        resolve_backend("cpu", "cuda")


def test_auto_chooses_an_installed_backend(monkeypatch):
    monkeypatch.setattr("realign_kernels.backends.dispatch._missing", lambda name: None)
    assert auto_backend("cpu") == "cpu"
    assert auto_backend("cuda") == "triton"
    assert auto_backend("mps") == "eager"
    monkeypatch.setattr(
        "realign_kernels.backends.dispatch._missing", lambda name: "it is not there"
    )
    assert auto_backend("cpu") == "eager"
    assert auto_backend("cuda") == "eager"


def test_a_group_needs_torch_distributed():
    with pytest.raises(RuntimeError, match=r"group must belong to an initialised torch\.dist"):
        call(linear_logprob, group=object())


@pytest.mark.parametrize("bad", [-1, -101, V, V + 1000, 2**31, -(2**63)])
def test_labels_out_of_range_are_refused_with_the_first_index(bad):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 1:] = bad
    message = rf"labels must be in \[0, V\) or ignore_index -100, got {bad} at index \(1, 1\) with"
    with pytest.raises(ValueError, match=message):
        call(linear_logprob, hidden_states=torch.zeros(2, 3, D), labels=labels)


@pytest.mark.parametrize("bad", [-1, V, 2**31])
def test_unchecked_labels_out_of_range_give_nan(bad, monkeypatch):
    """Without checks a wrong label must still never look like a log-probability."""
    monkeypatch.setenv("REALIGN_CHECK", "0")
    labels = torch.tensor([3, bad, 0, 0, 0, 0])
    assert torch.isnan(call(linear_logprob, labels=labels)).tolist() == [False, True] + [False] * 4


def batch(**changes):
    return {
        "hidden_states": torch.zeros(6, 2, D),
        "lm_head_weight": torch.zeros(V, D),
        "labels": torch.zeros(6, 2, dtype=torch.int64),
        "ref_logps": torch.zeros(3, 2),
        **changes,
    }


def packed(**changes):
    return batch(
        hidden_states=torch.zeros(N, D),
        labels=torch.zeros(N, dtype=torch.int64),
        **{"sequence_ids": torch.arange(N), **changes},
    )


ONES = torch.ones(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (batch(sequence_ids=torch.zeros(6, 2)), r"must have shape \(N, D\) with sequence_ids"),
        (batch(hidden_states=torch.zeros(6, D)), r"must have shape \(C \* P, T, D\) without seq"),
        (batch(ref_logps=torch.zeros(6)), r"ref_logps must have shape \(C, P\), got \(6,\)"),
        (batch(ref_logps=torch.zeros(3, 1)), r"must hold 3 sequences to match 3 cells of 1 pairs"),
        (batch(ref_logps=None, objective=Objective.symmetric()), "a multiple of 4 sequences .* 6"),
        (
            batch(ref_logps=torch.zeros(2, 3)),
            r"with C in \[3, 4\] to match objective, got \(2, 3\)",
        ),
        (packed(ref_logps=None), "sequence_lengths must be given for packed tokens without ref"),
        (packed(sequence_ids=torch.zeros(5)), r"sequence_ids must have shape \(6,\) .* got \(5,\)"),
        (packed(sequence_ids=torch.arange(6) - 1), r"in \[0, 6\), got -1 at index 0"),
        (packed(sequence_ids=torch.arange(6) + 1), r"in \[0, 6\), got 6 at index 5"),
        (
            packed(sequence_ids=torch.zeros(6, dtype=torch.int64, device="meta")),
            "sequence_ids must be on cpu to match labels, got meta",
        ),
        (packed(sequence_lengths=ONES[:2]), r"sequence_lengths must have shape \(3, 2\) to match"),
        (
            packed(ref_logps=None, sequence_lengths=ONES[0]),
            r"sequence_lengths must have shape \(C, P\), got \(2,\)",
        ),
        (packed(sequence_lengths=ONES.to("meta")), "sequence_lengths must be on the CPU, got meta"),
        (
            packed(sequence_lengths=torch.tensor([[1, 1], [1, 2], [1, 0]])),
            "got 2 for cell 1 of pair 1, which has 1",
        ),
        (
            packed(sequence_lengths=torch.tensor([[1, 0], [1, 2], [1, 1]])),
            r"num_tokens must be > 0 in cell 0 \(chosen\) of every pair, got 0 in pairs \[1\]",
        ),
        (batch(rejected_scoring="top1"), r"rejected_scoring must be one of \['label', 'top_non"),
        (
            batch(rejected_scoring="top_non_label", lm_head_weight=torch.zeros(1, D)),
            "lm_head_weight must have V >= 2 for rejected_scoring='top_non_label', got V = 1",
        ),
        (
            batch(objective=Objective.rdpo(), beta=0.2, image_weight=0.5),
            r"objective must be given without beta, .* got \{'beta': 0.2, 'image_weight': 0.5\}",
        ),
        (batch(objective=Objective.rdpo(), image_beta=0.1), r"got \{'image_beta': 0.1\}"),
        (batch(beta=-0.1), "beta must be finite and > 0, got -0.1"),
        (batch(image_weight=-1.0), "weight must be finite and >= 0, got -1.0"),
        (batch(temperature=0.0), "temperature must be finite and > 0"),
        (batch(backend="fast"), "backend must be one of"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_rdpo_loss_refuses_invalid_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        rdpo_loss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            packed(sequence_ids=torch.arange(6).int()),
            "sequence_ids must be torch.int64, got torch.i",
        ),
        (
            packed(sequence_lengths=ONES.int()),
            "sequence_lengths must be torch.int64, got torch.int32",
        ),
        (
            batch(ref_logps=torch.zeros(3, 2).half()),
            "ref_logps must be torch.float32 or torch.floa",
        ),
        (batch(lm_head_weight=torch.zeros(V, D).double()), "lm_head_weight must have dtype"),
    ],
)
def test_rdpo_loss_refuses_invalid_dtypes(arguments, message):
    with pytest.raises(TypeError, match=message):
        rdpo_loss(**arguments)


def test_value_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("REALIGN_CHECK", "0")
    lengths = torch.tensor([[1, 1], [1, 2], [1, 0]])
    assert rdpo_loss(**packed(sequence_lengths=lengths)).num_tokens.tolist() == ONES.tolist()


def test_a_known_number_of_rows_gives_the_same_scores(monkeypatch):
    """A GPU finds positions without waiting for a count when the lengths are known."""
    inputs = make_head_inputs(9, V, D, ignored=0.4)
    num_rows = int((inputs.labels != -100).sum())
    expected = inputs.call(linear_logprob)
    monkeypatch.setattr("realign_kernels.ops.score_tokens.known_number", lambda *_: num_rows)
    assert torch.equal(inputs.call(linear_logprob), expected)


BROKEN_LIBRARY = """
import importlib.util, sys, types, torch
find_spec = importlib.util.find_spec
def find(name, *rest):
    if name == "realign_kernels._csrc":
        return types.SimpleNamespace(origin=sys.argv[1])
    return find_spec(name, *rest)
importlib.util.find_spec = find
import realign_kernels as k
print(k.describe_backends())
arguments = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])
k.linear_logprob(*arguments)
try: k.linear_logprob(*arguments, backend="cpu")
except RuntimeError as error: print(error)
"""


def test_a_library_that_does_not_load_is_not_chosen(tmp_path):
    """A copy from another machine may not load: `auto` takes another backend and says why."""
    (tmp_path / "_csrc.so").write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_LIBRARY, str(tmp_path / "_csrc.so")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "'auto': 'eager on CPUs" in done.stdout
    assert done.stdout.count("its library does not load") == 2
    assert "install the package again" in done.stdout


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        (torch.tensor(0.5, requires_grad=True), TypeError, "a number as scaling, got Tensor"),
        (float("nan"), ValueError, "a finite scaling, got nan"),
    ],
    ids=["tensor", "nan"],
)
def test_the_adapter_scaling_must_be_a_number(scaling, error, message):
    factors = (torch.zeros(1, D), torch.zeros(V, 1), scaling)
    with pytest.raises(error, match=message):
        call(linear_logprob, lm_head_lora=factors)


def test_labels_of_another_shape_are_refused_with_any_scoring():
    with pytest.raises(ValueError, match=r"labels must have shape \(6, 3\) to match"):
        rdpo_loss(
            torch.zeros(6, 3, D), torch.zeros(V, D), torch.zeros(6, 4, dtype=torch.int64),
            torch.zeros(3, 2), rejected_scoring="top_non_label",
        )  # fmt: skip


def test_a_zero3_partitioned_weight_is_refused_with_the_gather_remedy():
    with pytest.raises(ValueError, match=r"got \(0,\)\. Gather it by deepspeed\.zero\.Gathered"):
        call(linear_logprob, lm_head_weight=torch.empty(0))
    with pytest.raises(ValueError, match=rf"got \({V}, {D + 1}\)\.$"):
        call(linear_logprob, lm_head_weight=torch.zeros(V, D + 1))
