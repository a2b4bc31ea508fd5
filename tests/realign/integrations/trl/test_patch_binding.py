"""The patch binds names of TRL for a time, and refuses some versions of TRL."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import distillation_trainer, utils

from realign.errors import RefusedError
from realign.integrations.trl import patch_trl
from realign_kernels.testing import make_head_inputs
from tests.realign.integrations.trl.conftest import USES_TRITON
from tests.realign.integrations.trl.head_calls import call, files_of_trl, patched


def test_nested_patches_apply_once_and_the_last_restores_the_originals():
    inputs = make_head_inputs(5, 61, 8, torch.float32)
    with patch_trl() as outer:
        function = utils._ChunkedLogProbFunction
        assert function is not ChunkedLogProbFunction
        with patch_trl() as inner:
            assert utils._ChunkedLogProbFunction is function
            call(utils._ChunkedLogProbFunction, inputs)
        assert utils._ChunkedLogProbFunction is function
        call(utils._ChunkedLogProbFunction, inputs)
    assert (outer.calls, inner.calls) == (2, 1)
    first, second = patch_trl(), patch_trl()
    first.undo()
    first.undo()  # ends no other
    assert utils._ChunkedLogProbFunction is function
    with second, second:
        pass
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with first:  # again
        call(utils._ChunkedLogProbFunction, inputs)
    assert first.calls == 1


def test_an_error_inside_the_context_ends_the_patch():
    with pytest.raises(ZeroDivisionError), patch_trl():
        _ = 1 / 0
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_compact_scoring_applies_on_cpu_when_requested():
    cpu, other = torch.device("cpu"), torch.device("cuda")
    with patch_trl():
        assert utils._use_triton(cpu)
        assert utils._use_triton(other) == USES_TRITON(other)
        assert distillation_trainer._use_triton is USES_TRITON  # of another function
        with patch_trl(compact=False):
            assert utils._use_triton is USES_TRITON
        assert utils._use_triton(cpu)
    with patch_trl(compact=False):
        assert utils._use_triton is USES_TRITON
        assert utils._ChunkedLogProbFunction is not ChunkedLogProbFunction


def test_every_reference_to_the_function_in_trl_is_patched():
    """A new reference that is bound before the patch would not be replaced by it."""
    assert files_of_trl("ChunkedLogProbFunction") == {
        "kernels/__init__.py",
        "kernels/chunked_logprob.py",
        "trainer/utils.py",
    }
    with patch_trl():
        function = utils._ChunkedLogProbFunction
        assert sys.modules["trl.kernels"].ChunkedLogProbFunction is function
        assert chunked_logprob.ChunkedLogProbFunction is function


def test_a_reference_kept_after_the_patch_calls_trls_function():
    """A module that imported the function during the patch has such a reference."""
    inputs = make_head_inputs(5, 61, 8, torch.float32)
    with patch_trl() as patch:
        kept = utils._ChunkedLogProbFunction
    expected = call(ChunkedLogProbFunction, inputs)[0]
    assert torch.equal(call(kept, inputs)[0], expected)
    assert (patch.calls, patch.passed_on) == (0, 0)


class Older:
    """The function of TRL 1.10."""

    @staticmethod
    def forward(ctx, last_hidden, weight, targets, temperature, chunk_size):
        """Nothing."""


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (Older, r"got \(last_hidden, weight, targets, temperature, chunk_size\) in trl 1\."),
        (object(), r"got no such function in trl 1\."),
        (None, r"got no such function in trl 1\."),
    ],
)
def test_a_function_with_other_arguments_is_refused(monkeypatch, function, got):
    with monkeypatch.context() as changed:
        changed.setattr(utils, "_ChunkedLogProbFunction", function)
        with pytest.raises(RefusedError, match=rf"requires .* trl >= 1\.15 .*{got}"):
            patch_trl()
        assert utils._ChunkedLogProbFunction is function
    with patch_trl() as patch:
        assert patch.calls == 0


def test_a_trl_version_without_compact_positions_is_patched(monkeypatch):
    """TRL 1.15 always scores the answers only."""
    inputs = make_head_inputs(5, 61, 8, torch.float32)
    with monkeypatch.context() as changed:
        changed.delattr(utils, "_use_triton")
        patched(inputs)
        assert not hasattr(utils, "_use_triton")


def test_a_missing_trl_is_refused_with_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(RefusedError, match=r"requires trl >= 1\.15.*pip install 'trl>=1\.15'"):
        patch_trl()
    monkeypatch.undo()


def test_compact_must_be_a_bool():
    with pytest.raises(RefusedError, match="compact must be True or False, got 'no'"):
        patch_trl(compact="no")  # type: ignore[arg-type]


@pytest.mark.full
# Dynamo asks every tensor that it meets for its .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_the_patched_function_compiles_as_far_as_trls_function():
    """The graph breaks, as with TRL's own function."""
    inputs = make_head_inputs(17, 61, 8, torch.float32).as_leaves()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        results = utils._ChunkedLogProbFunction.apply(hidden, weight, None, labels, 0.7, 32)
        return results[0].sum() + 0.5 * results[1].sum()

    compiled = torch.compile(loss, backend="eager")
    with patch_trl() as patch:
        for count in (17, 11, 13):
            arguments = inputs.hidden_states[:count], inputs.lm_head_weight, inputs.labels[:count]
            (found,) = torch.autograd.grad(compiled(*arguments), arguments[1])
            (expected,) = torch.autograd.grad(loss(*arguments), arguments[1])
            torch.testing.assert_close(found, expected)
    assert (patch.calls, patch.passed_on) == (6, 0)
