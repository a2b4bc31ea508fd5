"""Whole models for programs without support for adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.modeling.folder import is_adapter, resolve_base, resolve_model
from realign.runtime.strict_json import read_json


class SuiteModel(NamedTuple):
    """A model as a suite loads it."""

    name: str
    given: str
    """Folder or hub id that the user named."""
    folder: str
    """Absolute path of a whole model."""
    type: str
    """``model_type`` of its configuration."""
    language_type: str
    """``model_type`` of its language model."""
    is_merged: bool
    """True if it is an adapter that is merged into that folder."""


def find_models(models: Mapping[str, str], place: Path) -> dict[str, SuiteModel]:
    """Return the models that a suite will load; a merged adapter will be in ``models/NAME``.

    Args:
        models: Folders or hub ids by name.
        place: The folder that is written for the suite.
    Raises:
        RefusedError: There is none, a name is not plain, or a model is missing.
    """
    if not models:
        raise RefusedError(
            "models must have at least one model, got none. Pass --model NAME=FOLDER."
        )
    if bad := [name for name in models if not re.fullmatch(r"[\w.+-]+", name)]:
        raise RefusedError(
            f"models must have names of letters, digits and any of . _ + -, got {bad[0]!r}. "
            "Rename it."
        )
    found = {}
    for name, given in models.items():
        folder = resolve_model(given)
        is_merged = is_adapter(folder)
        config: Any = read_json((resolve_base(folder) if is_merged else folder) / "config.json")
        config = config if isinstance(config, dict) else {}
        whole = place / "models" / name if is_merged else folder.absolute()
        kind, language = config.get("model_type"), config.get("text_config")
        language = language.get("model_type") if isinstance(language, dict) else "llama"
        found[name] = SuiteModel(name, given, str(whole), str(kind), str(language), is_merged)
    return found


def merge_models(models: Iterable[SuiteModel], folder: Path) -> None:
    """Merge the adapters among models into ``models/NAME`` of a folder.

    Raises:
        RefusedError: One cannot be merged.
    """
    from realign.modeling.merge import merge

    for model in models:
        if model.is_merged:
            (folder / "models").mkdir(exist_ok=True)
            merge(str(resolve_model(model.given)), folder / "models" / model.name)
