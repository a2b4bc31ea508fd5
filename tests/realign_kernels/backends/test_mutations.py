"""Kernels broken on purpose must be caught: what is checked here is the checks.

Every mutant is a change of one place in ``csrc/`` or in the driver.  The check is a small sample of
what the other tests compare with float64.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from realign_kernels import Objective, Term, linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.backends import cpu
from realign_kernels.testing import (
    HeadInputs,
    dense_log_probs,
    dense_logprob,
    dense_rdpo_loss,
    make_head_inputs,
    seeded,
)

CSRC = Path(__file__).parents[3] / "csrc"

# Name: file, what stands there, what is put instead.
MUTANTS = {
    "dropped remainder": ("kernels.cpp", "if (i < columns_) f(", "if (false) f("),
    "phantom columns": ("kernels.cpp", "columns_ - i, -infinity<T>), i", "columns_ - i, T(0)), i"),
    "unshifted label": (
        "kernels.cpp", "label_(tile.labels[n] - tile.first_column)", "label_(tile.labels[n])"
    ),
    "label counted twice": ("kernels.cpp", "x_[label_] = -infinity<T>;", ";"),
    "missing phi": ("kernels.cpp", "return (T(1) - tanh * tanh) * linear;",
                    "return splat<T>(linear);"),
    "missing temperature": ("kernels.cpp", "z * (scale / temperature)", "z * scale"),
    "tanh of the half": ("lanes.h", "x < 0 ? x + x : -(x + x)", "x < 0 ? x : -x"),
    "shift never moves": ("kernels.cpp", "if (top == -infinity<T>) return;", "return;"),
    "sum not rescaled": ("kernels.cpp", "    rest_sum *= decay;", ""),
    "accumulator not rescaled": ("kernels.cpp", "row[i] *= factor;\n  }\n\n  // Returns",
                                 "row[i] *= 1;\n  }\n\n  // Returns"),
    "missing re-add": ("kernels.cpp", "tile_.released_ids[n_] = id;", ";"),
    "top found last": ("kernels.cpp", "while (x_[column] != top) ++column;",
                       "column = columns_ - 1; while (x_[column] != top) --column;"),
    "later equal takes over": ("kernels.cpp", "if (!(top > old_top)) return -1;",
                               "if (!(top >= old_top)) return -1;"),
    "top kept in a replay": ("kernels.cpp",
                             "if (tile_.top_ids != nullptr) put_at(", "if (false) put_at("),
    "Taylor terms missing": ("lanes.h", "static constexpr int degree = 7;",
                             "static constexpr int degree = 3;"),
    "bias of another column": ("kernels.cpp", "load<T>(bias + i)", "load<T>(bias)"),
    "entries one early": ("kernels.cpp", "e < starts[v + 1]; ++e", "e + 1 < starts[v + 1]; ++e"),
    "dot without its tail": ("kernels.cpp", "i < size; ++i) sums", "i < i; ++i) sums"),
    "half read as bfloat16": ("kernels.cpp", "result *= 0x1p112f;", ""),
    "absent cell counted": ("pairs.cpp", "if (!is_present_[cell]) return 0;", ""),
    "mean over one pair less": ("pairs.cpp", "total / static_cast<double>(pairs->num_pairs)",
                                "total / static_cast<double>(pairs->num_pairs + 1)"),
    "smoothing to one side": ("pairs.cpp", "smoothing * sigmoid(x) - (1 - smoothing)",
                              "-(1 - smoothing)"),
    "slope without weight": ("pairs.cpp", "term.weight * link.slope", "link.slope"),
    "ignored tokens summed": ("pairs.cpp", "if (pairs.labels[i] == pairs.ignore_index) continue;",
                              ""),
}  # fmt: skip


def check_heads():
    """Compare heads of every kind with float64."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float16, 2e-2)):
        for transform in (
            {"temperature": 1.5},
            {"logit_softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3},
        ):
            inputs = make_head_inputs(21, 77, 19, dtype, bias=True, rank=2, **transform)
            inputs.options["lm_head_bias"][60] += 4  # a top token in a late tile
            for memory, trains in (("auto", True), ("recompute", True), ("auto", False)):
                ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
                for tensor in () if trains else ours.tensors[1:]:
                    tensor.requires_grad_(False)
                # Tiles narrower than a vector, and wider.
                workspace_bytes = 1 << (12 if memory == "recompute" else 15)
                scores = ours.call(
                    linear_logprob_stats,
                    backend="cpu",
                    memory=memory,
                    workspace_bytes=workspace_bytes,
                )
                log_probs = dense_log_probs(dense)
                label = log_probs.gather(1, inputs.labels[:, None]).squeeze(1)
                others = log_probs.scatter(1, inputs.labels[:, None], -torch.inf)
                assert_close(scores.token_logps, label, min(tolerance, 1e-4))
                assert_close(scores.top_non_label_logps, others.amax(1), min(tolerance, 1e-4))
                assert_close(scores.entropy, -(log_probs.exp() * log_probs).sum(1), tolerance)
                (scores.token_logps + 2 * scores.top_non_label_logps).sum().backward()
                (label + 2 * others.amax(1)).sum().backward()
                for tensor, oracle in zip(ours.tensors, dense.tensors, strict=True):
                    if tensor.requires_grad:
                        assert_close(tensor.grad, oracle.grad, tolerance)


def check_float32():
    inputs = make_head_inputs(33, 97, 16, torch.float32)
    exact = dense_logprob(inputs.as_leaves(torch.float64))
    assert_close(inputs.call(linear_logprob, backend="cpu"), exact, 1e-5)


def check_ties():
    weight = torch.zeros(50, 3)
    weight[[7, 20, 21, 44]] = 1.0
    stats = linear_logprob_stats(
        torch.ones(2, 3), weight, torch.tensor([3, 7]), backend="cpu", workspace_bytes=600
    )
    assert stats.top_non_label_ids.tolist() == [7, 20]


def check_moved_rows():
    inputs = make_head_inputs(9, 97, 16, torch.float32, logit_std=1.0, bias=True)
    inputs.labels[:] = torch.arange(9)
    for token, height in ((50, 100.0), (70, 180.0), (96, 250.0)):
        inputs.options["lm_head_bias"][token] = height
    ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    for tensor in ours.tensors[1:]:
        tensor.requires_grad_(False)
    scores = ours.call(linear_logprob, backend="cpu", workspace_bytes=1 << 12)
    expected = dense_logprob(dense)
    assert_close(scores, expected, 1e-3)
    scores.sum().backward()
    expected.sum().backward()
    assert_close(ours.hidden_states.grad, dense.hidden_states.grad, 1e-4)


def check_pairs():
    generator = seeded(0)
    hidden_states = torch.randn(9, 4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (9, 4), generator=generator)
    labels[:, 3] = labels[8] = -100
    ref_logps = torch.randn(3, 3, generator=generator)
    terms = (
        Term((1, -1), weight=0.7, label_smoothing=0.2), Term((1, 0, -1), link="hinge"),
        Term((1, 0, -1), link="ipo", weight=0.1),
    )  # fmt: skip
    objective = Objective(terms, nll_weight=0.3)

    def results(loss_of):
        hidden = hidden_states.clone().requires_grad_()
        output = loss_of(hidden)
        output.loss.backward()
        return [*output, hidden.grad]

    actual = results(
        lambda hidden: rdpo_loss(
            hidden, weight, labels, ref_logps, objective=objective, backend="cpu"
        )
    )
    expected = results(
        lambda hidden: dense_rdpo_loss(HeadInputs(hidden, weight, labels, {}), ref_logps, objective)
    )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-9)


def assert_close(actual, expected, tolerance):
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).abs()
    assert (error <= tolerance * (1 + expected.double().abs())).all()


CHECKS = [check_heads, check_float32, check_ties, check_moved_rows, check_pairs]


def build(sources: Path, library: Path) -> None:
    objects = ["-DREALIGN_KERNELS=kernels_baseline", *(str(sources / name) for name in (
        "kernels.cpp", "pairs.cpp", "dispatch.cpp"))]  # fmt: skip
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *objects, "-o", str(library)],
        check=True,
        timeout=120,
    )


@pytest.fixture
def use_library(monkeypatch):
    """Make the CPU backend load another library."""

    def use(path: Path) -> None:
        monkeypatch.setattr(cpu, "library_path", lambda: str(path))
        cpu._library.cache_clear()

    yield use
    monkeypatch.undo()
    cpu._library.cache_clear()


def test_the_checks_pass_as_it_stands(use_library, tmp_path):
    build(CSRC, tmp_path / "library.so")
    use_library(tmp_path / "library.so")
    for check in CHECKS:
        check()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_caught(name, use_library, tmp_path):
    file, old, new = MUTANTS[name]
    sources = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    text = (sources / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
    (sources / file).write_text(text.replace(old, new), encoding="utf-8")
    build(sources, tmp_path / "library.so")
    use_library(tmp_path / "library.so")
    assert any(fails(check) for check in CHECKS)


DRIVER_MUTANTS = {
    "stash not rescaled": (
        "realign_kernels.fused.forward._Scratch.restore_moved_rows",
        lambda *_: None,
    ),
    "top kept in the stash": ("realign_kernels.fused.forward._drop_entries", lambda *_: None),
    "no exact entries": ("realign_kernels.fused.gradients._Entries.add", lambda *_: None),
    "tokens never given back": ("realign_kernels.fused.forward._Scratch.add_back", lambda *_: None),
}


@pytest.mark.parametrize("name", DRIVER_MUTANTS)
def test_a_broken_driver_is_caught(name, monkeypatch):
    monkeypatch.setattr(*DRIVER_MUTANTS[name])
    assert any(fails(check) for check in [*CHECKS, check_moved_stash])


def check_moved_stash():
    inputs = make_head_inputs(9, 97, 16, torch.float32, logit_std=1.0, bias=True)
    inputs.labels[:] = torch.arange(9)
    inputs.options["lm_head_bias"][50] = 100.0
    inputs.options["lm_head_bias"][90] = 101.0 + 60
    ours, dense = inputs.as_leaves(), inputs.as_leaves(torch.float64)
    ours.call(
        linear_logprob, backend="cpu", memory="stash", workspace_bytes=1 << 12
    ).sum().backward()
    dense_logprob(dense).sum().backward()
    assert_close(ours.lm_head_weight.grad, dense.lm_head_weight.grad, 1e-4)


def fails(check) -> bool:
    try:
        check()
    except (AssertionError, IndexError, RuntimeError):
        return True
    return False
