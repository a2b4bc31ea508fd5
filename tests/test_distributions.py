"""The distributions of one tree: what they hold, that their metadata fit together, and that they
work where nothing else of this tree is.

They are built without a network, by the command that publishes them.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import realign_kernels

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = ROOT / "distributions"


def build(project: Path, out: Path, *kinds: str) -> list[Path]:
    """Build a project as ``python -m build`` does; without kinds the sdist, and a wheel from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *kinds, project]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The sdist and the wheel of the kernels, in this order, the wheel built from the sdist."""
    wheel, sdist = build(DISTRIBUTIONS / "realign-kernels", tmp_path_factory.mktemp("kernels"))
    return [sdist, wheel]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the published ``realign``."""
    (wheel,) = build(DISTRIBUTIONS / "realign", tmp_path_factory.mktemp("pipeline"), "--wheel")
    return wheel


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    """Return the fields of a wheel's METADATA, which an index has to accept."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(name)
    Metadata.from_email(text, validate=True)
    return Parser().parsestr(text.decode())


def sources(package: str) -> set[str]:
    """Return the files of a package that the repository has."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", package]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {*listed.stdout.split()}


@pytest.mark.full
def test_the_kernels_wheel_holds_the_kernels_and_nothing_of_realign(tmp_path: Path) -> None:
    (built,) = build(DISTRIBUTIONS / "realign-kernels", tmp_path, "--wheel")
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = metadata_of(wheel)
        assert wheel.testzip() is None
    assert names == sources("realign_kernels") | {"realign_kernels/_csrc.so"}
    version = realign_kernels.__version__
    assert Path(wheel.filename or "").name.startswith(f"realign_kernels-{version}-py3-none-")
    assert "realign_kernels/py.typed" in names
    (torch,) = map(Requirement, metadata.get_all("Requires-Dist"))
    top = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(torch) in top["dependencies"]
    assert torch.url is None
    assert {*metadata["Requires-Python"].split(",")} == {*top["requires-python"].split(",")}
    assert "from realign_kernels import" in str(metadata.get_payload())


@pytest.mark.full
def test_the_kernels_sdist_builds_the_same_wheel(tmp_path: Path, kernels: list[Path]) -> None:
    sdist, built = kernels
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("realign_kernels-*")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= sources("realign_kernels") | sources("csrc") | {"LICENSE", "CMakeLists.txt"}
    assert not [name for name in files if name.startswith("realign/") or name.endswith(".so")]
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources("realign_kernels") | {"realign_kernels/_csrc.so"}


@pytest.mark.full
def test_the_published_realign_requires_the_kernels_package(
    pipeline: Path,
) -> None:
    with zipfile.ZipFile(pipeline) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = metadata_of(wheel)
    assert names == sources("realign") | {f"realign/{name}" for name in sources("recipes")}
    assert "realign/py.typed" in names
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")
    top = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {str(requirement) for requirement in required if requirement.marker is None}
    kernels = f"realign-kernels=={top['version']}"
    assert plain == {str(Requirement(line)) for line in [*top["dependencies"], kernels]}
    assert {*metadata.get_all("Provides-Extra")} == top["optional-dependencies"].keys()
    assert metadata["Version"] == top["version"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_all("Project-URL") == [f"Paper, {top['urls']['Paper']}"]


@pytest.mark.full
def test_published_wheels_work_without_the_source_tree(
    tmp_path: Path, kernels: list[Path], pipeline: Path
) -> None:
    """The new environment sees the installed libraries and the two wheels, but not the clone."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    wheels = [*install, "--no-deps", "--no-index", kernels[1], pipeline]
    subprocess.run([*map(str, wheels)], check=True, cwd=tmp_path)
    (own,) = environment.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (own / "libraries.pth").write_text("\n".join(libraries) + "\n")

    # a PYTHONPATH with the clone would be searched before the installed packages
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def output(*command: object) -> str:
        return subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env=variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    version = realign_kernels.__version__
    code = "import realign, realign_kernels as k; print(realign.__file__, k.__file__, sep='\\n')"
    code += "; print(k.describe_backends()['cpu'])"
    *places, cpu = output(python, "-c", code).splitlines()
    assert all(Path(place).is_relative_to(own) for place in places)
    assert cpu.startswith("available")  # the library that was compiled
    assert output(environment / "bin" / "realign", "--version") == f"realign {version}\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    loss = float(output(python, "-W", "error", "-c", example))
    assert loss == pytest.approx(2 * math.log(2), abs=1e-5)
