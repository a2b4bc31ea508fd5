"""The parts of a VLM that train or stay frozen: vision tower, projector, language model.

The name of a parameter determines its part. A projector inside the vision tower, such as Qwen's
``visual.merger``, belongs to the projector.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from realign.errors import RefusedError

Part = Literal["vision", "projector", "language", "unused"]
VISION_MODULES = ("vision_tower", "vision_model", "visual", "vision_encoder")
PROJECTOR_MODULES = (
    "multi_modal_projector",  # LLaVA, InternVL, Gemma-3, PaliGemma
    "image_newline",  # LLaVA-1.6, OneVision: a parameter beside the projector
    "connector",  # Idefics3, SmolVLM
    "aligner",  # Janus
    "merger",  # Qwen2-VL and later
    "deepstack_merger_list",  # Qwen3-VL
)
# Janus's image generation, which does not affect the likelihood of an answer: never trained
UNUSED_MODULES = ("vqmodel", "generation_embeddings", "generation_aligner", "generation_head")


def part_of(name: str) -> Part:
    """Return the part that a module or parameter belongs to, by its dotted name, also in peft."""
    path = set(name.split("."))
    if not path.isdisjoint(PROJECTOR_MODULES):
        return "projector"
    if not path.isdisjoint(VISION_MODULES):
        return "vision"
    return "language" if path.isdisjoint(UNUSED_MODULES) else "unused"


def frozen_parts(*, vision: bool, projector: bool, language: bool) -> set[Part]:
    """Return the frozen parts, which always include those that scoring does not use."""
    wanted: dict[Part, bool] = {"vision": vision, "projector": projector, "language": language}
    return {part for part, is_frozen in wanted.items() if is_frozen} | {"unused"}


def freeze_parts(model: nn.Module, frozen: Iterable[Part]) -> None:
    """Freeze parts of a model; parameters that were frozen before stay frozen.

    Raises:
        RefusedError: The model lacks a part that is to be frozen, or nothing is left to train.
    """
    frozen = set(frozen)
    found: set[Part] = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        found.add(part)
        if part in frozen:
            parameter.requires_grad_(False)
    known: dict[Part, tuple[str, ...]] = {
        "vision": VISION_MODULES,
        "projector": PROJECTOR_MODULES,
    }
    for part, names in known.items():
        if part in frozen - found:
            raise RefusedError(
                f"{type(model).__name__} has no {part} named {', '.join(names)}. Set "
                f"freeze_{part} to false."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RefusedError(
            "the options must leave something to train, got "
            f"{', '.join(sorted(frozen - {'unused'}))} frozen. Set one of freeze_vision, "
            "freeze_projector, freeze_language to false."
        )


def parts_pattern(parts: Iterable[Part]) -> str:
    """Return a regular expression for the full names of the parts' modules, for peft."""
    projector = rf"(.*\.)?({'|'.join(PROJECTOR_MODULES)})(\..*)?"
    vision = rf"(?!{projector}$)(.*\.)?({'|'.join(VISION_MODULES)})(\..*)?"
    unused = rf"(.*\.)?({'|'.join(UNUSED_MODULES)})(\..*)?"
    # everything else
    language = rf"(?!({projector}|{vision}|{unused})$).*"
    patterns = {"projector": projector, "vision": vision, "unused": unused, "language": language}
    return "|".join(f"({patterns[part]})" for part in sorted(parts))


def projector_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full names and the modules of the projector: the outermost that have a forward."""
    for name, module in model.named_modules():
        is_named = name.rpartition(".")[2] in PROJECTOR_MODULES
        is_inner = re.search(rf"(^|\.)({'|'.join(PROJECTOR_MODULES)})\.", name)
        if not is_named or is_inner:
            continue
        if isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{key}", inner) for key, inner in module.named_children())
        else:
            yield name, module


def disable_dropout(model: nn.Module) -> None:
    """Disable all dropout, so that a log-ratio compares two models and not two random masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def trains_projector(model: nn.Module) -> bool:
    """Return whether a parameter of the projector, or an adapter on it, trains."""
    return any(
        parameter.requires_grad and part_of(name) == "projector"
        for name, parameter in model.named_parameters()
    )


def check_projector_rate(model: nn.Module, rate: float | None) -> None:
    """Refuse a learning rate of the projector if no part of the projector trains.

    Raises:
        RefusedError: No part of it trains; the message names the ways to train it.
    """
    if rate is not None and not trains_projector(model):
        raise RefusedError(
            f"projector_learning_rate must be set only if the projector trains, got {rate}. Set "
            "train_projector, name its layers in lora.targets, or drop the rate."
        )


def give_projector_its_rate(optimizer: Optimizer, model: nn.Module, rate: float) -> None:
    """Move the projector's parameters into optimizer groups with their own learning rate and the
    same weight decay. Call it before the schedule is made.

    Args:
        optimizer: Optimizer of the parameters of ``model``; changed in place.
        model: The model, by whose names the projector's parameters are found.
        rate: Peak learning rate.
    Raises:
        RefusedError: No part of the projector trains.
    """
    check_projector_rate(model, rate)
    projector = {id(p) for name, p in model.named_parameters() if part_of(name) == "projector"}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in projector]
        group["params"] = [p for p in group["params"] if id(p) not in projector]
        if moved:
            options = {name: value for name, value in group.items() if name != "initial_lr"}
            optimizer.add_param_group({**options, "params": moved, "lr": rate})
    # schedules and checkpoints count groups, so none without parameters is left
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
