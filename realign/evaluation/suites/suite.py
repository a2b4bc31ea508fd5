"""The suites whose command is written and whose results are read: lmms-eval and VLMEvalKit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.evaluation.suites import (
    lmms_command,
    lmms_results,
    vlmevalkit_command,
    vlmevalkit_results,
)

SUITES = (lmms_command.NAME, vlmevalkit_command.NAME)


def write_suite(
    suite: str,
    models: Mapping[str, str],
    data: Path,
    images: Path | None,
    out: Path,
    *,
    python: str | None = None,
    device: str = "cuda",
    backend: str | None = None,
) -> list[str]:
    """Write the command of a suite and its files into a new folder.

    Args:
        suite: ``lmms-eval`` or ``vlmevalkit``.
        models: Folders or hub ids by name; an adapter is merged into its base.
        data: Folder with the published files; for VLMEvalKit with its tables.
        images: Folder of the questions' images; only for lmms-eval.
        out: A new folder.
        python: Interpreter of the environment that has the suite; by default this one.
        device: ``cuda`` or ``cpu``; VLMEvalKit has ``cuda`` alone.
        backend: Model class of the suite; by default that of a model's type.
    Returns:
        Lines to print.
    Raises:
        RefusedError: The suite is unknown, is not installed, or cannot evaluate the models.
    """
    if suite == lmms_command.NAME:
        if images is None:
            raise RefusedError("lmms-eval requires images, got none. Pass --images.")
        manifest = lmms_command.write_lmms_eval(
            models,
            data,
            images,
            out,
            python=python or sys.executable,
            device=device,
            backend=backend,
        )
        lines = lmms_command.summary(manifest)
    elif suite == vlmevalkit_command.NAME:
        lines = vlmevalkit_command.write_vlmevalkit(
            models, data, out, python=python or sys.executable, device=device, backend=backend
        )
    else:
        raise RefusedError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}. Name one.")
    return [*lines, f"run it: sh {out / 'run.sh'}", f"then: realign eval read-suite {out}"]


def read_suite(
    folder: Path, data: Path | None = None, *, allow_subset: bool = False, bootstrap: int = 0
) -> dict[str, Any]:
    """Read the results of a suite, which is recognised by its files.

    Args:
        folder: Folder of a written command, or with a suite's results.
        data: Folder with the published files of the benchmarks.
        allow_subset: Whether to read runs of lmms-eval that asked a part of the questions.
        bootstrap: Number of draws for the 95 % intervals; 0 for none.
    Returns:
        The content of ``suite_scores.json``.
    Raises:
        RefusedError: There is no result, or it cannot be read.
    """
    if any(folder.rglob("*_results.json")):
        return lmms_results.read_lmms_eval(
            folder, data, allow_subset=allow_subset, bootstrap=bootstrap
        )
    if any(path.is_dir() for path in folder.rglob("T[0-9]*")):
        return vlmevalkit_results.read_vlmevalkit(folder, data, bootstrap=bootstrap)
    raise RefusedError(
        f"folder must hold results of lmms-eval (*_results.json) or VLMEvalKit (T.../), got "
        f"{folder}, which has neither. Run run.sh there first."
    )
