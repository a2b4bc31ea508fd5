"""Labels are moved to the hidden state that predicts them, with the mask of the answer."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import linear_logprob, shift_labels

TOKENS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
ANSWERS = torch.tensor([[False, False, True, True], [False, True, False, False]])


def test_labels_are_shifted_to_the_position_that_predicts_them():
    assert shift_labels(TOKENS).tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]
    assert shift_labels(TOKENS, ANSWERS).tolist() == [[-100, 7, 8, -100], [2, -100, -100, -100]]
    masked = torch.where(ANSWERS, TOKENS, -100)
    assert torch.equal(shift_labels(masked), shift_labels(TOKENS, ANSWERS))
    assert shift_labels(TOKENS[0], ignore_index=0).tolist() == [6, 7, 8, 0]
    assert torch.equal(shift_labels(TOKENS[None]), shift_labels(TOKENS)[None])


def test_scores_equal_those_of_truncated_states_and_labels():
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 4, 8, generator=generator), torch.randn(9, 8)
    cut = linear_logprob(states[:, :-1].contiguous(), weight, TOKENS[:, 1:].contiguous())
    whole = linear_logprob(states, weight, shift_labels(TOKENS))
    assert torch.equal(whole[:, :-1], cut)
    assert not whole[:, -1].any()


def test_shift_labels_does_not_modify_its_inputs():
    tokens, answers = TOKENS.clone(), ANSWERS.clone()
    shift_labels(tokens, answers)
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(answers, ANSWERS)


def test_sequences_without_a_scored_token_are_refused_unless_allowed():
    # The only answer token is the first of its sequence, which no state predicts.
    answers = torch.tensor([[False, True, False, False], [True, False, False, False]])
    with pytest.raises(ValueError, match=r"scored in every sequence.*got none in sequences \[1\]"):
        shift_labels(TOKENS, answers)
    assert shift_labels(TOKENS, answers, allow_absent=True)[1].eq(-100).all()
    assert shift_labels(TOKENS[:, :0], allow_absent=True).shape == (2, 0)
    assert shift_labels(TOKENS[:0]).shape == (0, 4)


@pytest.mark.parametrize("ignore_index", [2**53 + 1, 2**63 - 1, -(2**53) - 1])
def test_the_last_position_is_ignored_for_any_integer(ignore_index):
    """A float64 holds none of these."""
    assert shift_labels(TOKENS, ignore_index=ignore_index)[:, -1].tolist() == [ignore_index] * 2


def test_checks_of_values_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("REALIGN_CHECK", "0")
    assert shift_labels(TOKENS[:, :1]).tolist() == [[-100], [-100]]


@pytest.mark.full  # torch loads its compiler
def test_shift_labels_compiles_into_one_graph():
    compiled = torch.compile(shift_labels, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TOKENS, ANSWERS), shift_labels(TOKENS, ANSWERS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shift_labels([[1, 2]]), TypeError, "labels must be a torch.Tensor"),
        (lambda: shift_labels(TOKENS.int()), TypeError, "labels must be torch.int64"),
        (lambda: shift_labels(TOKENS[0, 0]), ValueError, r"labels must have shape \(\.\.\., T\)"),
        (
            lambda: shift_labels(TOKENS, ANSWERS.long()),
            TypeError,
            "is_answer must be torch.bool, got torch.int64. Call .bool",
        ),
        (
            lambda: shift_labels(TOKENS, ANSWERS[:, 1:]),
            ValueError,
            r"is_answer must have shape \(2, 4\) to match labels, got \(2, 3\). Pass both unsh",
        ),
        (
            lambda: shift_labels(TOKENS, ANSWERS.to("meta")),
            ValueError,
            "is_answer must be on cpu to match labels, got meta",
        ),
        (lambda: shift_labels(TOKENS, ignore_index=0.5), TypeError, "ignore_index must be an int"),
        (lambda: shift_labels(TOKENS, allow_absent=1), TypeError, "allow_absent must be True or"),
    ],
)
def test_invalid_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
