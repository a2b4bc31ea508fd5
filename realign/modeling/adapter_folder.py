"""Loading of adapters from folders onto their base; every tensor is checked."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

from realign.errors import RefusedError
from realign.modeling.adapters import keep_adapters_in_float32, quiet_peft
from realign.modeling.folder import adapter_base, is_adapter
from realign.modeling.model_config import load_model_config

WEIGHTS = "adapter_model.safetensors"
# files that other programs write beside an adapter, with the fully trained projector
PICKLES = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
_PREFIX = "base_model.model."
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that does not fit its base, without loading the base's weights. A model
    that is not an adapter passes.

    Raises:
        RefusedError: For the reasons of :func:`wrap_model` and :func:`read_weights`.
    """
    if is_adapter(folder):
        config = load_model_config(folder)
        with torch.device("meta"):
            outline = AutoModelForImageTextToText.from_config(config)
        read_weights(folder, wrap_model(outline, folder))


def load_adapter(base: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """Put an adapter on its base, with the weights in the folder.

    Args:
        base: The base, with its weights.
        folder: The adapter's folder.
        is_trainable: Whether the adapter will be trained further.
    Raises:
        RefusedError: For the reasons of :func:`wrap_model` and :func:`read_weights`.
    """
    from peft import set_peft_model_state_dict

    model = wrap_model(base, folder, is_trainable=is_trainable)
    weights = read_weights(folder, model)
    set_peft_model_state_dict(model, weights)
    keep_adapters_in_float32(model, weights)
    return model if is_trainable else model.eval()


def wrap_model(base: Any, folder: Path, *, is_trainable: bool = True) -> Any:
    """Put an adapter's layers on a model, without the weights in the folder.

    Args:
        base: The adapter's base, which may be on the meta device.
        folder: The adapter's folder.
        is_trainable: Whether the adapter's layers require gradients.
    Raises:
        RefusedError: The adapter's configuration is invalid, or does not fit the base.
    """
    from peft import PeftConfig, get_peft_model

    def refusal(rule: str, got: str, remedy: str) -> RefusedError:
        file = folder / "adapter_config.json"
        return RefusedError(f"{file} must {rule}, got {got}. {remedy}")

    again = "Download or write the adapter again."
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise refusal("be the configuration of an adapter of peft", _reason(error), again) from None
    if config.is_prompt_learning or not hasattr(config, "target_modules"):
        kind = str(config.peft_type).rpartition(".")[2]
        remedy = "Give a LoRA adapter, or a whole model."
        raise refusal("adapt the layers of a model", f"the type {kind}", remedy)
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    trained_on = str(mapping.get("base_model_class", ""))
    known: Any = getattr(transformers, trained_on, None)
    trained_on_type = getattr(getattr(known, "config_class", None), "model_type", None)
    if trained_on_type not in (None, base.config.model_type):
        raise refusal(
            f"name a base of the class {trained_on}, on which the adapter was trained",
            f"{config.base_model_name_or_path!r}, a {type(base).__name__}",
            "Set base_model_name_or_path to the base that it was trained on.",
        )
    config.inference_mode = not is_trainable
    if base.device.type == "meta":
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # other initializations decompose the base's weights
        else:  # other kinds of adapters read values of the base; memory is reserved, not filled
            base.to_empty(device="cpu")
    base.name_or_path = config.base_model_name_or_path  # without it, peft warns of another base
    try:
        with quiet_peft(), torch.device("meta" if base.device.type == "meta" else "cpu"):
            # patterns that match no layer of the base: their ranks and scalings would be lost
            warnings.filterwarnings("error", message=".*_pattern keys did not match any")
            model = get_peft_model(base, config)
    except Exception as error:  # which one peft raises depends on the kind of adapter
        remedy = "Set base_model_name_or_path to the base that it was trained on, or correct it."
        raise refusal(f"fit its base {adapter_base(folder)}", _reason(error), remedy) from None
    return model


def read_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """Read the weights of an adapter, each under its name in the model.

    Names from earlier releases of transformers are converted as for whole models. Weights of the
    base that are saved with the adapter, such as its embedding, are read too.

    Args:
        folder: The adapter's folder.
        model: Model from :func:`wrap_model`; the values of its weights do not matter.
    Raises:
        RefusedError: The folder lacks a weight of the adapter, or holds a pickle, a weight that the
            model lacks or has in another shape, or a weight that is not finite or is quantized.
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
    flaws = [f"{len(names)} {flaw}, first: {min(names)}" for flaw, names in wrong.items() if names]
    if flaws:
        raise RefusedError(
            f"adapter {folder} must hold every weight of its layers on {adapter_base(folder)} and "
            f"no other, got {'; '.join(flaws)}. Download it again, or set base_model_name_or_path "
            f"in {folder / 'adapter_config.json'} to the base that it was trained on."
        )
    for name, weight in weights.items():
        if not known[name].is_floating_point():  # indices, in some kinds of adapters
            continue
        if weight.dtype not in _DTYPES:  # quantized, with unknown scales
            raise RefusedError(
                f"adapter {folder} must hold weights of 16, 32 or 64 bits, got {weight.dtype} in "
                f"{name}. Convert them to float32."
            )
        # one pass over the weight, which may be large; both bounds are NaN if any value is
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
            f"adapter {folder} must hold everything that was trained in {WEIGHTS}, got "
            f"{found[0]} beside it, a pickle, which is not read. Merge the adapter with the "
            "program that wrote it, or move that file away to use the adapter without it."
        )
    file = folder / WEIGHTS
    if not file.is_file():
        raise RefusedError(
            f"adapter {folder} must hold {WEIGHTS}, got none; a pickle is not read. Convert the "
            "adapter to safetensors."
        )
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RefusedError(
            f"{file} must be a whole safetensors file, got {_reason(error)}. Download it again."
        ) from None


def _in_names_of(
    model: Any, known: Collection[str], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename weights from earlier releases of transformers by its rules for whole checkpoints: peft
    itself renames neither a projector nor a module that was trained in full.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [
        rule
        for rule in get_model_conversion_mapping(model.get_base_model(), add_legacy=False)
        if isinstance(rule, WeightRenaming)
    ]
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        plain = name.removeprefix(_PREFIX)
        for rule in rules:
            plain, _ = rule.rename_source_key(plain)
        current = _PREFIX + plain
        is_older = name not in known and current in known and current not in {*weights, *renamed}
        renamed[current if is_older else name] = weight
    return renamed


def _reason(error: Exception) -> str:
    """Return a library's message as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
