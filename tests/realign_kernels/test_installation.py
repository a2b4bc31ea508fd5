"""Two distributions that hold the package: one working package, or a refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import realign_kernels
from realign_kernels.installation import check_installations, installed_files, library_was_removed

NEW, OLD = {"__init__.py": "b", "cells.py": "c"}, {"__init__.py": "a"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write what pip records of a distribution; the folder comes first on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, version: str, files: dict[str, str], *others: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
        lines = [f"realign_kernels/{path},sha256={digest},7" for path, digest in files.items()]
        (folder / "RECORD").write_text("\n".join([*lines, *others, f"{folder.name}/RECORD,,\n"]))

    return write


@pytest.mark.parametrize(
    ("of_realign", "of_kernels"),
    [(OLD, {}), ({}, NEW), (NEW, NEW), ({"_csrc.so": "x"}, {**NEW, "_csrc.so": "y"})],
)
def test_one_distribution_or_two_with_equal_files_are_accepted(install, of_realign, of_kernels):
    install("realign", "0.1.0", of_realign, "realign/__init__.py,sha256=z,7")
    install("realign-kernels", "0.2.0", of_kernels)
    check_installations()
    assert len(installed_files("realign")) == len(of_realign)


def test_a_mixed_installation_is_refused_with_both_versions_and_a_remedy(install):
    install("realign", "0.1.0", OLD)
    install("realign-kernels", "0.2.0", NEW)
    message = (
        r"must come from one distribution, got the files of realign 0\.1\.0 and realign-kernels "
        r"0\.2\.0, which differ\. Run `pip uninstall -y realign realign-kernels`"
    )
    with pytest.raises(ImportError, match=message):
        check_installations()


def test_bytecode_compiled_on_installation_is_ignored(install):
    cached = "realign_kernels/__pycache__/cells.cpython-311.pyc,,"
    install("realign", "0.1.0", NEW, cached)
    install("realign-kernels", "0.1.0", NEW)
    check_installations()


def test_a_library_that_was_removed_differs_from_one_that_was_never_built(install):
    install("realign-kernels", "0.1.0", NEW)
    install("realign", "0.1.0", OLD)
    assert not library_was_removed()


def test_a_removed_library_is_reported(install):
    install("realign-kernels", "0.1.0", {**NEW, "_csrc.so": "x"})
    assert library_was_removed()


def test_realign_without_its_kernels_is_refused_with_the_remedy(tmp_path):
    """A folder that pip leaves, since it holds a file of another program, has no modules."""
    (tmp_path / "realign_kernels").mkdir()
    root = Path(__file__).parents[2]
    for path in (None, tmp_path):
        code = (
            "import importlib.machinery, importlib.util\n"
            f"spec = importlib.machinery.PathFinder.find_spec('realign_kernels', [{str(path)!r}])\n"
            "importlib.util.find_spec = lambda name: spec\n"
            "import realign\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
        )
        assert result.returncode == 1
        assert "ImportError: realign requires realign_kernels" in result.stderr
        assert "--force-reinstall --no-deps realign-kernels" in result.stderr


def test_both_packages_have_the_same_version():
    import tomllib

    import realign

    root = Path(__file__).parents[2]
    for project in (".", "distributions/realign-kernels"):
        text = (root / project / "pyproject.toml").read_text(encoding="utf-8")
        assert tomllib.loads(text)["project"]["version"] == realign_kernels.__version__
    assert realign.__version__ == realign_kernels.__version__
