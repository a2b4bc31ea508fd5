"""Adapters in folders: put on a model that is shown to be theirs, tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from realign.errors import RefusedError
from realign.modeling.adapters import keep_adapters_in_float32, quiet_peft
from realign.modeling.folder import adapter_base, is_adapter, resolve_base

WEIGHTS = "adapter_model.safetensors"
# what other programs write beside an adapter, with the projector that they trained in full
PICKLES = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
_PREFIX = "base_model.model."


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that does not fit its base, whose weights are not loaded. A model that is
    no adapter passes.

    Raises:
        RefusedError: As :func:`wrap_model` and :func:`read_weights`.
    """
    if is_adapter(folder):
        base = AutoConfig.from_pretrained(resolve_base(folder))
        with torch.device("meta"):
            outline = wrap_model(AutoModelForImageTextToText.from_config(base), folder)
        read_weights(folder, outline)


def load_adapter(base: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """Put an adapter on its base, with the weights that the folder holds.

    Args:
        base: The base, with its weights.
        folder: The adapter's folder.
        is_trainable: Whether the adapter will be trained on.
    Raises:
        RefusedError: As :func:`wrap_model` and :func:`read_weights`.
    """
    from peft import set_peft_model_state_dict

    model = wrap_model(base, folder, is_trainable=is_trainable)
    weights = read_weights(folder, model)
    set_peft_model_state_dict(model, weights)
    keep_adapters_in_float32(model, weights)
    return model if is_trainable else model.eval()


def wrap_model(base: Any, folder: Path, *, is_trainable: bool = True) -> Any:
    """Put an adapter's layers on a model, without the weights that the folder holds.

    Args:
        base: The adapter's base; on the meta device too.
        folder: The adapter's folder.
        is_trainable: Whether the adapter's layers require gradients.
    Raises:
        RefusedError: The folder says of the adapter what cannot be, or what does not fit the base.
    """
    from peft import PeftConfig, get_peft_model

    def refusal(rule: str, got: str, remedy: str) -> RefusedError:
        file = folder / "adapter_config.json"
        return RefusedError(f"{file} must {rule}, got {got}. {remedy}")

    again = "Download or write the adapter again."
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise refusal("be the configuration of an adapter of peft", _said(error), again) from None
    if config.is_prompt_learning or not hasattr(config, "target_modules"):
        kind = str(config.peft_type).rpartition(".")[2]
        remedy = "Give a LoRA adapter, or a whole model."
        raise refusal("adapt the layers of a model", f"the type {kind}", remedy)
    trained_on = (config.auto_mapping or {}).get("base_model_class", "")
    known: Any = getattr(transformers, trained_on, None)
    trained_on_type = getattr(getattr(known, "config_class", None), "model_type", None)
    if trained_on_type not in (None, base.config.model_type):
        raise refusal(
            f"name a base of the class {trained_on}, on which the adapter was trained",
            f"{config.base_model_name_or_path!r}, a {type(base).__name__}",
            "Set base_model_name_or_path to the base that it was trained on.",
        )
    config.inference_mode = not is_trainable
    if base.device.type == "meta" and hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways decompose the weights, which are not there
    base.name_or_path = config.base_model_name_or_path  # else peft says that it was renamed
    try:
        with quiet_peft():
            # names of layers that the base does not have: their ranks and scalings would be lost
            warnings.filterwarnings("error", message=".*_pattern keys did not match any")
            model = get_peft_model(base, config)
    except Exception as error:  # peft raises any, by the kind of adapter
        remedy = "Set base_model_name_or_path to the base that it was trained on, or correct it."
        raise refusal(f"fit its base {adapter_base(folder)}", _said(error), remedy) from None
    return model


def read_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """Read the weights of an adapter, each under the name that it has in the model.

    Names of earlier releases of transformers are put right as those of whole models are. Weights of
    the base that the adapter brings along, such as its embedding, are read too.

    Args:
        folder: The adapter's folder.
        model: From :func:`wrap_model`; its weights are not looked at.
    Raises:
        RefusedError: The folder lacks a weight of the adapter, or holds one that the model has not
            or has in another shape, or one that is not finite, or a pickle.
    """
    from peft import get_peft_model_state_dict

    with quiet_peft():
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    known = {**model.state_dict(), **wanted}
    weights = _in_names_of(model, known.keys(), _read(folder))
    shapes = {
        name: (tuple(weight.shape), tuple(known[name].shape))
        for name, weight in weights.items()
        if name in known
    }
    wrong = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in known],
        "of another shape": [
            f"{name}, {found} instead of {needed}"
            for name, (found, needed) in shapes.items()
            if found != needed
        ],
    }
    said = [f"{len(names)} {what}, first: {min(names)}" for what, names in wrong.items() if names]
    if said:
        raise RefusedError(
            f"adapter {folder} must hold every weight of its layers on {adapter_base(folder)} and "
            f"no other, got {'; '.join(said)}. Download it again, or set base_model_name_or_path "
            f"in {folder / 'adapter_config.json'} to the base that it was trained on."
        )
    for name, weight in weights.items():
        # one pass over gigabytes; both are NaN where any value is
        if weight.numel() and not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise RefusedError(
                f"adapter {folder} must hold finite weights, got NaN or infinity in {name}. "
                "Download it again, or give an earlier checkpoint."
            )
    return weights


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if found := [name for name in PICKLES if (folder / name).is_file()]:
        raise RefusedError(
            f"adapter {folder} must hold all that was trained in {WEIGHTS}, got {found[0]} beside "
            "it, a pickle, which is not read. Merge the adapter with the program that wrote it, or "
            "move that file away to use the adapter without it."
        )
    file = folder / WEIGHTS
    if not file.is_file():
        raise RefusedError(
            f"adapter {folder} must hold {WEIGHTS}, has none; a pickle is not read. Convert it."
        )
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RefusedError(
            f"{file} must be a whole safetensors file, got {_said(error)}. Download it again."
        ) from None


def _in_names_of(
    model: Any, known: Collection[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the weights that the model does not know by the rules for whole checkpoints: peft
    renames some of them itself, but neither a projector nor a module that trained in full.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [
        rule
        for rule in get_model_conversion_mapping(model.get_base_model(), add_legacy=False)
        if isinstance(rule, WeightRenaming)
    ]
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        today = _PREFIX + apply_renamings(name.removeprefix(_PREFIX), rules)
        is_older = name not in known and today in known and today not in {*weights, *renamed}
        renamed[today if is_older else name] = weight
    return renamed


def _said(error: Exception) -> str:
    """The words of a library, as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
