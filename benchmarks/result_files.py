"""Result files: cells by key, each with the run that measured it; several runs share a file.

    {"runs": {id: environment}, "cells": {key: {"status": ..., "run": id, ...}}}

``status`` is ``ok``, ``failed``, ``unavailable`` (with a reason) or ``not measured``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_DISTRIBUTIONS = (
    "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "transformers",
    "numpy", "peft", "flash-attn", "accelerate", "bitsandbytes", "deepspeed",
)  # fmt: skip
_MEASURED = ("ok", "failed")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Describe everything that a measurement depends on: commit, device, versions."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__
    found = {
        "commit": commit or current_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device_name(device),
        "driver": None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    if device.type == "cuda":
        found["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = os.cpu_count() or 0
    return f"{names[0] if names else platform.processor() or 'CPU'}, {cores} cores"


def slug(name: str) -> str:
    """Return a device's name in a form for file names."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def current_commit() -> str:
    """Return the commit of this checkout, with "+" where files differ from it; or "unknown"."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    changed = _output(
        "git",
        "status",
        "--porcelain",
        "--",
        "realign",
        "realign_kernels",
        "csrc",
        "benchmarks/*.py",
    )
    return f"{commit}+" if changed else commit


def merge(path: Path, run: dict[str, Any], cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add cells to a file, which is replaced as a whole, and return its new content.

    A measured cell is only replaced by a measured one, never by one that says why it is absent.
    """
    content = load(path)
    number = max((int(name) for name in content["runs"]), default=0) + 1
    known = [name for name, other in content["runs"].items() if other == run]
    run_id = known[0] if known else str(number)
    content["runs"][run_id] = run
    for key, cell in cells.items():
        before = content["cells"].get(key)
        if before is None or cell["status"] in _MEASURED or before["status"] not in _MEASURED:
            content["cells"][key] = {**cell, "run": run_id}
    in_use = {cell["run"] for cell in content["cells"].values()}
    content["runs"] = {name: other for name, other in content["runs"].items() if name in in_use}
    content["cells"] = dict(sorted(content["cells"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    part.replace(path)
    return content


def load(path: Path) -> dict[str, Any]:
    """Read a result file; a missing file has no cells."""
    if not path.is_file():
        return {"runs": {}, "cells": {}}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def is_current(content: dict[str, Any], key: str, run: dict[str, Any]) -> bool:
    """Return whether a cell was measured by the same code on the same machine."""
    cell = content["cells"].get(key)
    if cell is None or cell["status"] != "ok":
        return False
    earlier = content["runs"][cell["run"]]
    same = ("commit", "device", "driver", "versions", "threads")
    return not run["commit"].endswith(("+", "unknown")) and all(
        earlier[name] == run[name] for name in same
    )


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[1])
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
