"""Loading a VLM and its processor, and knowing which one it is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from realign.acceleration import Acceleration, use_liger_layers
from realign.adapter_precision import keep_adapters_in_float32
from realign.errors import RefusedError
from realign.families import CHAT_TEMPLATES
from realign.files import file_sha256
from realign.image_only import load_without_videos
from realign.preference_forward import attach_preference_forward

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def resolve_model(model: str, option: str = "model") -> Path:
    """Return the folder of a model: a folder as it is, a hub id downloaded.

    Args:
        model: Folder or hub id.
        option: What named it, for messages.
    Raises:
        RefusedError: Neither a folder with a config nor something that the hub or its local cache
            has.
    """
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise RefusedError(
                f"{option} must be a folder with config.json or adapter_config.json, got {model}. "
                f"Check --{option}."
            )
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise RefusedError(
            f"{option} must be an existing folder or a hub id, got {model}, which does not exist. "
            f"Check --{option}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise RefusedError(
            f"{option} must be a folder or a hub id, got {model!r} "
            f"({str(error).strip().splitlines()[0]}). Check --{option}."
        ) from None


def model_identity(folder: Path, *, generates: bool = False) -> dict[str, str]:
    """SHA-256 of every file of a model folder that its outputs depend on, base model included for
    an adapter.

    Args:
        folder: From :func:`resolve_model`.
        generates: Whether it will be asked for answers, which ``generation_config.json`` shapes;
            log-probabilities do not depend on it.
    """
    without = {"README.md"} | (set() if generates else {"generation_config.json"})
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    identity = {path.name: file_sha256(path) for path in files if path.name not in without}
    if is_adapter(folder):
        base = _resolve_base(folder)
        of_base = model_identity(base, generates=generates)
        identity |= {f"base/{name}": digest for name, digest in of_base.items()}
    return identity


def is_adapter(folder: Path) -> bool:
    """Whether a model folder is an adapter on another one."""
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path) -> str:
    """What an adapter calls its base."""
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def _resolve_base(folder: Path) -> Path:
    base = adapter_base(folder)
    try:
        return resolve_model(base)
    except RefusedError as error:
        raise RefusedError(
            f"adapter {folder} must have its base model, got {base!r}, which was not found. "
            f"Set base_model_name_or_path in {folder / 'adapter_config.json'} to the "
            f"base's folder or hub id.\n{error}"
        ) from None


def lasting_name(model: str) -> str:
    """What an adapter can call its base from any directory: a folder's absolute path, a hub id as
    it is.
    """
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def choose_dtype(dtype: str) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 products are slow."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    trainable_adapter: bool = False,
    name: str | None = None,
    scoring: bool = True,
    acceleration: Acceleration | None = None,
) -> PreTrainedModel:
    """Load a VLM, or an adapter on its base, with dropout off. No remote code is run.

    Args:
        folder: From :func:`resolve_model`.
        dtype: Of the weights.
        trainable_adapter: Whether an adapter will be trained on.
        name: What adapters trained on the model call it; a hub id is good on other machines too.
        scoring: Whether it will score answers; a model that only speaks need not be one of those
            whose logits are understood.
        acceleration: How it computes; as transformers does with SDPA attention by default.
    """
    acceleration = acceleration or Acceleration()
    if is_adapter(folder):
        from peft import PeftModel

        base = load_model(
            _resolve_base(folder),
            dtype,
            name=adapter_base(folder),
            scoring=scoring,
            acceleration=acceleration,
        )
        with quiet_peft():
            model = PeftModel.from_pretrained(base, folder, is_trainable=trainable_adapter)
        keep_adapters_in_float32(model, folder)
        return model
    if not any(folder.glob("*.safetensors")):
        raise RefusedError(f"model {folder} must hold safetensors weights, has none. Convert it.")
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **acceleration.loading(dtype),
    )
    if lacking := sorted([*found["missing_keys"], *found["mismatched_keys"]]):
        raise RefusedError(
            f"model {folder} must hold every weight, lacks {len(lacking)}, first: {lacking[0]}. "
            "Download it again."
        )
    if name:
        model.name_or_path = model.config._name_or_path = name
    disable_dropout(model)
    if acceleration.liger:
        use_liger_layers(model)
    if scoring:
        attach_preference_forward(model)
    return model


def load_processor(folder: Path) -> Any:
    """Load the processor of a model folder, or of an adapter's base when the adapter has none of
    its own.

    Raises:
        RefusedError: It has no chat template, or no fast tokenizer.
    """
    if not (folder / "processor_config.json").is_file() and is_adapter(folder):
        folder = _resolve_base(folder)
    processor = load_without_videos(folder) or AutoProcessor.from_pretrained(folder)
    if not getattr(processor, "chat_template", None):
        processor.chat_template = CHAT_TEMPLATES.get(type(processor).__name__)
    if not processor.chat_template:
        raise RefusedError(
            f"{folder} must have a chat template, has none. Add chat_template.jinja to the folder."
        )
    if not processor.tokenizer.is_fast:
        raise RefusedError(
            f"{folder} must have a fast tokenizer, got {type(processor.tokenizer).__name__}. "
            "Add tokenizer.json to the folder."
        )
    return processor


def load_model_config(folder: Path) -> Any:
    """Load the configuration of a model folder, or of an adapter's base."""
    return AutoConfig.from_pretrained(_resolve_base(folder) if is_adapter(folder) else folder)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what peft 0.21 says of itself: it reads a property that transformers 5.23 renamed,
    and asks the hub for the base's configuration whenever it saves, to compare vocabularies.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        for message in ("Could not find a config file in", "Unable to fetch remote file"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def disable_dropout(model: nn.Module) -> None:
    """Switch all dropout off: a log-ratio compares two models, not two draws of noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
