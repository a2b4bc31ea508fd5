"""The distributions of one tree: what their wheels hold, and that their metadata fit together.

The wheels are built by the build backend itself, without a network.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = ROOT / "distributions"


def build(project: Path, out: Path, kind: str = "wheel") -> Path:
    """Build a project's wheel or sdist into a folder."""
    code = f"import sys; from scikit_build_core.build import build_{kind} as b; b(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=project, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (built,) = out.iterdir()
    return built


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    """Return the fields of a wheel's METADATA."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def sources(package: str) -> set[str]:
    """Return the files of a package that the repository has."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", package]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {*listed.stdout.split()}


@pytest.mark.full
def test_the_kernels_wheel_holds_the_kernels_and_nothing_of_realign(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(DISTRIBUTIONS / "realign-kernels", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = metadata_of(wheel)
        assert wheel.testzip() is None
    assert names == sources("realign_kernels") | {"realign_kernels/_csrc.so"}
    assert Path(wheel.filename or "").name.startswith("realign_kernels-0.1.0-py3-none-")
    (torch,) = map(Requirement, metadata.get_all("Requires-Dist"))
    top = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(torch) in top["dependencies"]
    assert torch.url is None
    assert {*metadata["Requires-Python"].split(",")} == {*top["requires-python"].split(",")}
    assert "from realign_kernels import" in str(metadata.get_payload())


@pytest.mark.full
def test_the_kernels_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    sdist = build(DISTRIBUTIONS / "realign-kernels", tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("realign_kernels-*")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= sources("realign_kernels") | sources("csrc") | {"LICENSE", "CMakeLists.txt"}
    assert not [name for name in files if name.startswith("realign/") or name.endswith(".so")]
    with zipfile.ZipFile(build(folder, tmp_path / "wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources("realign_kernels") | {"realign_kernels/_csrc.so"}


@pytest.mark.full
def test_the_published_realign_requires_the_kernels_in_place_of_holding_them(
    tmp_path: Path,
) -> None:
    with zipfile.ZipFile(build(DISTRIBUTIONS / "realign", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = metadata_of(wheel)
    assert names == sources("realign") | {f"realign/{name}" for name in sources("recipes")}
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")
    top = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {str(requirement) for requirement in required if requirement.marker is None}
    kernels = f"realign-kernels=={top['version']}"
    assert plain == {str(Requirement(line)) for line in [*top["dependencies"], kernels]}
    assert {*metadata.get_all("Provides-Extra")} == top["optional-dependencies"].keys()
    assert metadata["Version"] == top["version"]
