"""Configurations of models, read from their folders or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

from realign.errors import RefusedError
from realign.modeling.folder import first_line, is_adapter, resolve_base


def load_model_config(folder: Path) -> Any:
    """Load the configuration of a model folder, or of an adapter's base.

    Raises:
        RefusedError: The configuration cannot be read, or is not that of a vision-language model.
    """
    folder = resolve_base(folder) if is_adapter(folder) else folder
    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many kinds: each configuration has its own checks
        raise RefusedError(
            f"{file} must be a configuration that transformers {transformers.__version__} reads, "
            f"got {type(error).__name__}: {first_line(error)}. Download it again, or upgrade "
            "transformers if the model is newer."
        ) from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise RefusedError(
            f"{file} must be that of a vision-language model, got the type {config.model_type!r}, "
            "which transformers does not load with AutoModelForImageTextToText. Name another model."
        )
    return config
