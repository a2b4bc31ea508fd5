"""The distributions hold every file of both packages, and dependencies have tested bounds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pathspec
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BUILT = ("realign", "realign_kernels", "csrc")


def test_wheels_hold_the_recipes() -> None:
    """`realign init` reads the recipes from the wheel."""
    for project in (ROOT, ROOT / "distributions" / "realign"):
        text = (project / "pyproject.toml").read_text(encoding="utf-8")
        packages = tomllib.loads(text)["tool"]["scikit-build"]["wheel"]["packages"]
        assert (project / packages["realign/recipes"]).resolve() == ROOT / "recipes"


def test_no_file_of_a_package_is_excluded_from_the_distributions() -> None:
    """Patterns without a slash in front match a folder of that name at any depth."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["scikit-build"]["sdist"]["exclude"]
    excluded = pathspec.GitIgnoreSpec.from_lines(patterns)
    paths = [path for folder in BUILT for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts]
    assert len(files) > 200
    assert not [name for name in files if excluded.match_file(name)]


def pins(name: str) -> dict[str, str]:
    """Return the versions that a file of constraints names."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    stated = [Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")]
    return {found.name.lower(): next(iter(found.specifier)).version for found in stated}


def requirements_of_users() -> list[Requirement]:
    """Return what the two packages need, with every extra that has been run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("pipeline", "similarity", "endpoint", "retrieval", "ray", "report", "browse")
    chosen = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*project["dependencies"], *chosen]]


@pytest.mark.parametrize("requirement", requirements_of_users(), ids=lambda item: item.name)
def test_dependency_bounds_equal_the_tested_versions(requirement: Requirement) -> None:
    """`make test-oldest` installs the lower bounds, `make test` a set that they allow."""
    (bound,) = [item.version for item in requirement.specifier if item.operator == ">="]
    assert pins("constraints-oldest.txt")[requirement.name.lower()] == bound
    assert requirement.specifier.contains(pins("constraints.txt")[requirement.name.lower()])
