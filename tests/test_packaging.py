"""What is built for others holds every file of both packages."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pathspec

ROOT = Path(__file__).parents[1]
BUILT = ("realign/", "realign_kernels/", "csrc/")


def test_wheels_hold_the_recipes() -> None:
    """`realign init` reads them there."""
    for project in (ROOT, ROOT / "distributions" / "realign"):
        text = (project / "pyproject.toml").read_text(encoding="utf-8")
        packages = tomllib.loads(text)["tool"]["scikit-build"]["wheel"]["packages"]
        assert (project / packages["realign/recipes"]).resolve() == ROOT / "recipes"


def test_no_file_of_a_package_is_left_out_of_what_is_built() -> None:
    """Patterns without a slash in front match a folder of that name at any depth."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["scikit-build"]["sdist"]["exclude"]
    excluded = pathspec.GitIgnoreSpec.from_lines(patterns)
    files = subprocess.run(
        ["git", "ls-files", *BUILT], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert len(files) > 200
    assert not [name for name in files if name and excluded.match_file(name)]
