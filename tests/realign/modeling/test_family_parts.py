"""Parts of every family: what is frozen has no gradient, what trains has one, and a projector that
trains beside an adapter begins where the reference is.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from realign.modeling.adapters import add_adapter
from realign.modeling.parts import freeze_parts, frozen_parts, part_of
from realign.modeling.preference_forward import attach_preference_forward
from realign_kernels import Objective
from tests.realign.modeling.families.family import Family
from tests.realign.modeling.families.pairs import all_kinds
from tests.realign.modeling.families.registry import FAMILIES
from tests.realign.modeling.families.scoring import collate


def attached(name: str, dtype: torch.dtype = torch.float32) -> Family:
    family = FAMILIES[name]()
    family.model.to(dtype)
    attach_preference_forward(family.model)
    return family


def backward(family: Family, model: nn.Module) -> torch.Tensor:
    """One step's gradients; returns the log-probabilities."""
    batch = collate(family, all_kinds(), 3, shared=True)
    del batch["ids"]
    output = model(**batch, objective=Objective.rdpo())
    output.loss.backward()
    return output.logps.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_trained_parts_have_gradients(name: str) -> None:
    family = attached(name)
    names = [parameter for parameter, _ in family.model.named_parameters()]
    assert {part_of(parameter) for parameter in names} >= {"vision", "projector", "language"}
    freeze_parts(family.model, frozen_parts(vision=True, projector=False, language=False))
    backward(family, family.model)
    for parameter, value in family.model.named_parameters():
        trains = part_of(parameter) in ("projector", "language")
        assert value.requires_grad == trains, parameter
        # a learned end of image rows, which a processor of single views does not use
        if trains and not parameter.endswith("image_newline"):
            assert value.grad is not None, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_a_projector_trained_with_an_adapter_starts_at_the_reference(name: str) -> None:
    family = attached(name, torch.bfloat16)
    with torch.no_grad():
        batch = collate(family, all_kinds(), 3, shared=True)
        del batch["ids"]
        reference = family.model(**batch).logps
    model = add_adapter(
        family.model,
        rank=2,
        alpha=4,
        targets="all-linear",
        freeze_vision=True,
        train_projector=True,
    )
    assert torch.equal(backward(family, model), reference)
    saved = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert saved
    assert {part_of(parameter) for parameter in saved} == {"projector"}
    for parameter, value in saved.items():
        assert value.dtype == torch.float32, parameter
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
