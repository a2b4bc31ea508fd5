"""Arguments of a wrong type, dtype, shape or order: every message names one and says what to do."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from realign_kernels import (
    Objective,
    Term,
    linear_logprob,
    linear_logprob_stats,
    preference_loss,
    rdpo_loss,
)

N, V, D, T = 6, 11, 4, 2


class ModelOutput:
    last_hidden_state = torch.zeros(N, T, D)


WRONG = {
    "a list": [[1.0, 2.0]],
    "NumPy": np.zeros((2, 2)),
    "a module": torch.nn.Linear(D, V),
    "a tuple of tensors": (torch.zeros(2), torch.zeros(2)),
    "an empty tuple": (),
    "a string": "x",
    "None": None,
    "a number": 3,
    "a negative number": -0.5,
    "a large number": 2**70,
    "a truth value": True,
    "NaN": float("nan"),
    "a dict": {},
    "an output": ModelOutput(),
    "a scalar tensor": torch.tensor(1.0),
    "int32": torch.zeros(3, 2).int(),
    "bool": torch.zeros(N, T) > 1,
    "half": torch.zeros(3, 2).half(),
    "complex": torch.zeros(3, 2).cfloat(),
    "sparse": torch.zeros(N, D).to_sparse(),
    "another length": torch.zeros(5, dtype=torch.long),
    "a function": print,
    "an object": object(),
    "a NumPy number": np.float32(2),
    "an objective": Objective.rdpo(),
    "a term": Term((1, -1)),
    "a dtype": torch.float32,
    "another device": torch.zeros(3, 2, device="meta"),
    "four dimensions": torch.zeros(1, N, T, D),
}

HEAD = {
    "hidden_states": torch.zeros(N, D),
    "lm_head_weight": torch.zeros(V, D),
    "labels": torch.zeros(N).long(),
}
PADDED = {
    "hidden_states": torch.zeros(N, T, D),
    "lm_head_weight": torch.zeros(V, D),
    "labels": torch.zeros(N, T).long(),
    "ref_logps": torch.zeros(3, 2),
}
PACKED = {
    **HEAD,
    "ref_logps": torch.zeros(3, 2),
    "sequence_ids": torch.arange(N),
    "sequence_lengths": torch.ones(3, 2).long(),
}
PREFERENCES = {
    "logps": torch.zeros(3, 2),
    "ref_logps": torch.zeros(3, 2),
    "objective": Objective.rdpo(),
}
CALLS = {
    "linear_logprob": (linear_logprob, HEAD),
    "linear_logprob_stats": (linear_logprob_stats, HEAD),
    "rdpo_loss": (rdpo_loss, PADDED),
    "packed rdpo_loss": (rdpo_loss, PACKED),
    "preference_loss": (preference_loss, PREFERENCES),
    "Term": (Term, {"coefficients": (1, -1)}),
    "Objective": (Objective, {"terms": (Term((1, -1)),)}),
    "Objective.dpo": (Objective.dpo, {}),
    "Objective.rdpo": (Objective.rdpo, {}),
    "Objective.mdpo": (Objective.mdpo, {}),
    "Objective.symmetric": (Objective.symmetric, {}),
}
# Hidden states say what the others have to be, and sequence_ids what form these have to have.
OTHERS = {
    "hidden_states": ("lm_head_weight", "labels"),
    "sequence_ids": ("hidden_states",),
    "logps": ("ref_logps",),
}


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call in CALLS for name in inspect.signature(CALLS[call][0]).parameters],
)
def test_wrong_values_are_refused_by_name(call, name):
    """A value that passes is one that the argument may have."""
    function, arguments = CALLS[call]
    names = (name, *OTHERS.get(name, ()))
    for kind, value in WRONG.items():
        # Nothing is a group in a process without torch.distributed, which its message says.
        refusal = RuntimeError if name == "group" else TypeError
        try:
            function(**{**arguments, name: value})
        except (TypeError, ValueError, refusal) as error:
            message = str(error)
            assert message.startswith(names), (kind, message)
            assert ", got " in message, (kind, message)
            # A remedy is a sentence of its own; another hidden size has none.
            assert (
                "lm_head_weight must have shape" in message or message.rstrip(".").count(". ") >= 1
            ), (kind, message)
            for foreign in ("realign::", "attribute", "schema", "Declaration"):
                assert foreign not in message, (kind, message)
        else:
            assert value is None or isinstance(value, bool | int | float | np.float32 | Objective)


@pytest.mark.parametrize(
    ("call", "changes", "error", "message"),
    [
        (
            "rdpo_loss",
            {"ref_logps": None, "hidden_states": torch.zeros(4, T, D),
             "labels": torch.zeros(4, T).long()},
            ValueError,
            r"hidden_states must hold a multiple of 3 sequences to match objective, got 4\. "
            r"2 cells are DPO: pass objective=Objective\.dpo\(\)",
        ),
        (
            "rdpo_loss",
            {"ref_logps": torch.zeros(2, 5)},
            ValueError,
            r"ref_logps must have shape \(C, P\) with C in \[3, 4\] to match objective, "
            r"got \(2, 5\)\. 2 cells are DPO: pass objective=Objective\.dpo\(\)",
        ),
        (
            "rdpo_loss",
            {"ref_logps": (torch.zeros(2), torch.zeros(2))},
            TypeError,
            r"ref_logps must be a torch\.Tensor or None, got tuple of 2 tensors\. "
            r"Call torch\.stack",
        ),
        (
            "rdpo_loss",
            {"objective": "dpo"},
            TypeError,
            r"objective must be an Objective or None, got 'dpo'\. .*Objective\.dpo\(\)",
        ),
        (
            "preference_loss",
            {"objective": "dpo"},
            TypeError,
            r"objective must be an Objective, got 'dpo'\. .*Objective\.dpo\(\)",
        ),
        (
            "preference_loss",
            {"objective": Term((1, -1))},
            TypeError,
            r"objective must be an Objective, got .*Term\. Pass Objective\(\(term,\)\)",
        ),
        (
            "packed rdpo_loss",
            {"sequence_lengths": [[1, 1], [1, 1], [1, 1]]},
            TypeError,
            r"sequence_lengths must be a torch\.Tensor or None, got list\. Call torch\.as_tensor",
        ),
        (
            "linear_logprob",
            {"lm_head_weight": torch.nn.Linear(D, V)},
            TypeError,
            r"lm_head_weight must be a torch\.Tensor, got torch's Linear\. Pass its \.weight",
        ),
        (
            "linear_logprob",
            {"labels": np.zeros(N, dtype=np.int64)},
            TypeError,
            r"labels must be a torch\.Tensor, got numpy's ndarray\. Call torch\.as_tensor",
        ),
        (
            "linear_logprob",
            {"hidden_states": ModelOutput()},
            TypeError,
            r"hidden_states must be a torch\.Tensor, got .*ModelOutput\. .*last_hidden_state",
        ),
        (
            "linear_logprob",
            {"labels": torch.zeros(N).int()},
            TypeError,
            r"labels must be torch\.int64, got torch\.int32\. Call \.long\(\)",
        ),
        (
            "linear_logprob",
            {"hidden_states": torch.zeros(V, D), "lm_head_weight": torch.zeros(N, D)},
            ValueError,
            r"labels must have shape \(11,\) to match hidden_states, got \(6,\)\. "
            "hidden_states and lm_head_weight seem swapped",
        ),
        (
            "rdpo_loss",
            {"hidden_states": torch.zeros(V, D), "lm_head_weight": torch.zeros(N, T, D)},
            ValueError,
            r"hidden_states must have shape .* got \(11, 4\)\. hidden_states and lm_head_weight "
            "seem swapped",
        ),
        (
            "packed rdpo_loss",
            {"hidden_states": torch.zeros(V, D), "lm_head_weight": torch.zeros(N, D)},
            ValueError,
            "hidden_states and lm_head_weight seem swapped",
        ),
        (
            "linear_logprob",
            {"hidden_states": torch.zeros(N).long(), "labels": torch.zeros(N, D)},
            ValueError,
            "hidden_states and labels seem swapped",
        ),
        (
            "rdpo_loss",
            {"hidden_states": torch.zeros(N, T).long(), "labels": torch.zeros(N, T, D)},
            ValueError,
            "hidden_states and labels seem swapped",
        ),
        (
            "linear_logprob",
            {"lm_head_weight": torch.zeros(N).long(), "labels": torch.zeros(V, D)},
            ValueError,
            "lm_head_weight and labels seem swapped",
        ),
        (
            "rdpo_loss",
            {"labels": torch.zeros(3, 2), "ref_logps": torch.zeros(N, T).long()},
            TypeError,
            "labels and ref_logps seem swapped",
        ),
        (
            "linear_logprob",
            {"lm_head_weight": torch.zeros(D, V)},
            ValueError,
            r"got \(4, 11\)\. It looks transposed: pass its \.T",
        ),
        (
            "rdpo_loss",
            {"hidden_states": torch.zeros(N, T, V)},
            ValueError,
            r"lm_head_weight must have shape \(V, 11\) .*, got \(11, 4\)\. "
            "Pass what the last layer returns, not logits",
        ),
        (
            "rdpo_loss",
            {"ref_logps": torch.zeros(2, 3)},
            ValueError,
            r"ref_logps must have shape \(C, P\) .*, got \(2, 3\)\. .*looks transposed",
        ),
        (
            "rdpo_loss",
            {"ref_logps": torch.zeros(7, 3)},
            ValueError,
            r"ref_logps must have shape \(C, P\) .*, got \(7, 3\)\. It looks transposed",
        ),
        (
            "packed rdpo_loss",
            {"ref_logps": torch.zeros(4, 3), "sequence_lengths": torch.ones(3, 4).long()},
            ValueError,
            r"sequence_lengths must have shape \(4, 3\) .*One of the two looks transposed",
        ),
        (
            "packed rdpo_loss",
            {"ref_logps": None, "sequence_lengths": torch.ones(6, 3).long()},
            ValueError,
            r"sequence_lengths must have shape \(C, P\) .* got \(6, 3\)\. It looks transposed",
        ),
        (
            "preference_loss",
            {"logps": torch.zeros(5, 3)},
            ValueError,
            r"logps must have shape \(C, P\) .*, got \(5, 3\)\. It looks transposed",
        ),
        (
            "preference_loss",
            {"ref_logps": torch.zeros(2, 3)},
            ValueError,
            r"ref_logps must have shape \(3, 2\) to match logps, got \(2, 3\)\. It looks transp",
        ),
        (
            "preference_loss",
            {"objective": Objective.symmetric()},
            ValueError,
            r"logps must have .* \[4, 4\] .* got \(3, 2\)\. 3 cells are rDPO",
        ),
        (
            "linear_logprob",
            {"labels": torch.zeros(N, 1).long()},
            ValueError,
            r"got \(6, 1\)\. Drop the last dimension",
        ),
        (
            "rdpo_loss",
            {"labels": torch.zeros(N, T + 1).long()},
            ValueError,
            r"got \(6, 3\)\. Shift both alike",
        ),
        (
            "linear_logprob",
            {"temperature": torch.tensor(1.0)},
            TypeError,
            r"temperature must be a number, got Tensor of shape \(\)\. It would get no gradient",
        ),
        (
            "linear_logprob",
            {"lm_head_weight": torch.zeros(V, D).to(torch.uint8)},
            TypeError,
            r"lm_head_weight must be one of .*, got torch\.uint8\. Dequantize",
        ),
        (
            "Objective.rdpo",
            {"image_beta": -1.0},
            ValueError,
            r"image_beta must be finite and > 0, got -1\.0\.",
        ),
        (
            "Objective.mdpo",
            {"anchor_weight": "1"},
            TypeError,
            r"anchor_weight must be a number, got '1'\. Pass the number itself",
        ),
        (
            "linear_logprob",
            {"group": "tp"},
            TypeError,
            r"group must be a torch\.distributed\.ProcessGroup or None, got 'tp'\.",
        ),
    ],
)  # fmt: skip
def test_refusals_name_a_fitting_remedy(call, changes, error, message):
    function, arguments = CALLS[call]
    with pytest.raises(error, match=message):
        function(**{**arguments, **changes})


def test_numpy_numbers_are_accepted_as_numbers():
    expected = linear_logprob(**HEAD, temperature=2.0, ignore_index=3)
    actual = linear_logprob(**HEAD, temperature=np.float32(2), ignore_index=np.int64(3))
    assert torch.equal(actual, expected)
    assert Term(np.array([1.0, -1.0]), beta=np.float32(0.5)).coefficients == (1.0, -1.0, 0.0, 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name():
    nested = torch.nested.nested_tensor([torch.zeros(2, D)])
    for name in ("hidden_states", "lm_head_bias", "labels"):
        message = f"{name} must be a plain tensor, got a nested one. Pad or pack"
        with pytest.raises(TypeError, match=message):
            linear_logprob(**{**HEAD, name: nested})


def test_a_dtensor_is_refused_by_name():
    """Weights of FSDP2 are gathered; hidden states and labels are those of a rank."""
    kind = type("DTensor", (torch.Tensor,), {})
    hidden_states = torch.zeros(N, D).as_subclass(kind)
    with pytest.raises(TypeError, match=r"hidden_states must be a plain tensor, got a DTensor"):
        linear_logprob(**{**HEAD, "hidden_states": hidden_states})
