"""Imports point one way, in the source and when the packages are imported cold."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "yaml.load",
    "pickle.load",
    "pickle.loads",
    "urlopen",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_kernels_import_torch_alone() -> None:
    for path in modules("realign_kernels"):
        others = ("realign.", "transformers", "numpy")
        if path.parent.name != "_triton":  # loaded at the first call on a GPU
            others = (*others, "triton")
        for name in imported(path):
            assert not name.startswith(others), (path, name)
            assert name != "realign", path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("realign/records.py", ("realign.config", "realign.trainer", "torch", "transformers")),
        ("realign/parquet.py", ("realign.config", "realign.trainer", "torch", "transformers")),
        ("realign/official.py", ("realign.config", "realign.trainer", "torch", "transformers")),
        ("realign/config.py", ("realign.build", "realign.trainer", "torch", "transformers")),
        ("realign/files.py", ("realign.records", "realign.images", "realign.config", "torch")),
        ("realign/inspection.py", ("realign.records", "realign.config", "torch", "transformers")),
        ("realign/image_worker.py", ("realign.records", "realign.inspection", "torch")),
        ("realign/check/repeats.py", ("realign.config", "realign.collate", "torch")),
        ("realign/check/rows.py", ("realign.config", "realign.train", "realign.cache")),
        ("realign/build/masking.py", ("torch", "realign.config", "realign.generate")),
        ("realign/build/sources/read.py", ("torch", "transformers", "datasets", "realign.config")),
        ("realign/build/sources/formats.py", ("realign.build.sources.read", "realign.files")),
        ("realign/export/run.py", ("realign.build", "realign.config", "torch", "transformers")),
        ("realign/collate.py", ("realign.trainer", "realign.cache", "realign.config")),
        ("realign/trainer.py", ("realign.build", "realign.eval", "realign.cache", "realign.demo")),
        ("realign/report/run_page.py", ("torch", "transformers", "realign.build", "realign.train")),
        ("realign/report/dataset_page.py", ("torch", "transformers", "realign.build")),
        ("realign/browse/app.py", ("torch", "transformers", "realign.build", "realign.report")),
        ("realign/decisions.py", ("torch", "realign.dataset", "realign.config", "realign.browse")),
        ("realign/demo/world.py", ("PIL", "torch", "realign.build")),
    ],
)
def test_a_module_does_not_know_what_is_above_it(module: str, forbidden: tuple[str, ...]) -> None:
    for name in imported(ROOT / module):
        assert not any(name == bad or name.startswith(f"{bad}.") for bad in forbidden), name


def test_only_the_demo_knows_the_demo_and_nothing_knows_tests() -> None:
    for path in modules("realign"):
        if "demo" not in path.parts and path.name != "cli.py":
            assert not [name for name in imported(path) if name.startswith("realign.demo")], path
        assert not [n for n in imported(path) if n.startswith(("tests", "benchmarks"))], path


def test_no_module_is_a_drawer() -> None:
    names = {path.name for path in (*modules("realign"), *modules("realign_kernels"))}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}


def test_nothing_unpickles_evaluates_or_fetches() -> None:
    for path in (*modules("realign"), *modules("realign_kernels")):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & FORBIDDEN_CALLS, path
        assert "trust_remote_code" not in path.read_text(), path


def test_kernels_import_without_the_pipelines_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'accelerate', 'peft', 'PIL', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "import realign_kernels\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_names_its_extra_when_typer_is_missing() -> None:
    code = "import sys; sys.modules['typer'] = None; import realign.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'realign[pipeline]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_public_names_of_realign() -> None:
    import realign

    assert realign.__all__ == [
        "PreferenceCollator",
        "RDPOConfig",
        "RDPOTrainer",
        "Record",
        "RefusedError",
        "read_records",
        "write_parquet",
    ]
    for name in realign.__all__:
        assert getattr(realign, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realign.nothing


def test_no_source_file_is_ignored_by_git() -> None:
    files = [str(path) for package in ("realign", "realign_kernels") for path in modules(package)]
    command = ["git", "-c", "safe.directory=*", "check-ignore", *files]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (ignored.returncode, ignored.stdout) == (1, b"")
