"""Parameter groups of an optimizer: the projector may learn at its own rate."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from realign.errors import RefusedError
from realign.model_parts import part_of


def trains_projector(model: nn.Module) -> bool:
    """Whether a parameter of the projector, or an adapter on it, trains."""
    return any(
        parameter.requires_grad and part_of(name) == "projector"
        for name, parameter in model.named_parameters()
    )


def check_projector_rate(model: nn.Module, rate: float | None) -> None:
    """Refuse a learning rate of the projector where nothing of it trains.

    Raises:
        RefusedError: Naming the ways to train it.
    """
    if rate is not None and not trains_projector(model):
        raise RefusedError(
            f"projector_learning_rate must be set only where the projector trains, got {rate}. Set "
            "train_projector, name its layers in lora.targets, or drop it."
        )


def give_projector_its_rate(optimizer: Optimizer, model: nn.Module, rate: float) -> None:
    """Move the projector's parameters out of their groups into ones with a rate of their own, with
    the weight decay that they had. Call it before the schedule is made.

    Args:
        optimizer: Of the parameters of ``model``; changed in place.
        model: Names the parameters.
        rate: Peak learning rate.
    Raises:
        RefusedError: Nothing of the projector trains.
    """
    check_projector_rate(model, rate)
    projector = {id(p) for name, p in model.named_parameters() if part_of(name) == "projector"}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in projector]
        group["params"] = [p for p in group["params"] if id(p) not in projector]
        if moved:
            options = {name: value for name, value in group.items() if name != "initial_lr"}
            optimizer.add_param_group({**options, "params": moved, "lr": rate})
    # a schedule and a checkpoint count groups, and one without parameters is of no use to either
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
