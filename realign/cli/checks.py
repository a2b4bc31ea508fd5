"""Checks of files and folders before heavy libraries are imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign.errors import RefusedError

Images = Annotated[Path | None, typer.Option(help="Image folder; required for JSON.")]


def check_out(out: Path, *models: str) -> None:
    """Refuse an output folder or a model's folder before heavy libraries are imported."""
    from realign.modeling.folder import check_model
    from realign.runtime.run_folder import check_out

    check_out(out)
    for model in models:
        check_model(model)


def check_exists(option: str, path: Path | None, kind: str, remedy: str = "") -> None:
    """Refuse a missing file or folder before heavy libraries are imported."""
    if path is not None and not path.exists():
        remedy = remedy or f"Check --{option}"
        raise RefusedError(f"{option} must be {kind}, got {path}, which does not exist. {remedy}.")


def check_cache(folder: Path | None, remedy: str = "Check the path") -> None:
    """Refuse a missing cache folder before heavy libraries are imported."""
    check_exists("cache", folder, "a folder of `realign cache`", remedy)
