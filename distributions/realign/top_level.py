"""Metadata of the published ``realign``: that of the top level, and its kernels as a dependency."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``[project]`` that the top level has."""
    top = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    fields = {name: top[name] for name in project["dynamic"]}
    readme = (ROOT / top["readme"]).read_text(encoding="utf-8")
    fields["readme"] = {"text": readme, "content-type": "text/markdown"}
    fields["dependencies"] = [*top["dependencies"], f"realign-kernels=={top['version']}"]
    return fields
