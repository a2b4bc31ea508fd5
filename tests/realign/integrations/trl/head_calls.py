"""Calls of TRL's log-probability function, and of what the patch puts in its place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trl.trainer import utils

from realign.integrations.trl import patch_trl
from realign_kernels.testing import HeadInputs


def call(function: Any, inputs: HeadInputs, *outputs: tuple[str, ...], chunk_size: int = 32) -> Any:
    """Call TRL's function, or the one in its place."""
    options = inputs.options
    return function.apply(
        inputs.hidden_states,
        inputs.lm_head_weight,
        options.get("lm_head_bias"),
        inputs.labels,
        options.get("temperature", 1.0),
        chunk_size,
        options.get("logit_softcap"),
        options.get("logit_scale", 1.0),
        *outputs,
    )


def patched(inputs: HeadInputs, *outputs: tuple[str, ...]) -> Any:
    """Call TRL's function with the patch on; the head must answer."""
    with patch_trl() as patch:
        results = call(utils._ChunkedLogProbFunction, inputs, *outputs)
    assert (patch.calls, patch.passed_on) == (1, 0)
    return results


def files_of_trl(text: str) -> set[str]:
    """Files of the installed TRL that hold a text."""
    (root,) = importlib.util.find_spec("trl").submodule_search_locations
    return {
        path.relative_to(root).as_posix()
        for path in Path(root).rglob("*.py")
        if text in path.read_text(encoding="utf-8")
    }
