"""The order of the rooms, and rules for every file of the packages.

A room is a folder, or a file at the top, of a package. `ROOMS` says which other rooms each may
import; every import counts: at the top of a file, inside a function, and for types.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import realign_kernels

ROOT = Path(__file__).parents[1]

GROUND = {"errors", "realign_kernels"}
DATA = GROUND | {"runtime", "data"}
MODELS = DATA | {"modeling"}
COMMANDS = MODELS | {"config", "generation", "reference"}
EVERYTHING = COMMANDS | {"training", "evaluation", "building", "review"}
ROOMS = {
    "realign": {
        "errors": set[str](),
        "config": {"errors"},
        "config_file": {"config", "errors", "runtime"},
        "recipe_file": {"config", "config_file", "errors", "runtime"},
        "runtime": GROUND,
        "data": GROUND | {"runtime"},
        "modeling": DATA,
        "generation": MODELS,
        "reference": MODELS | {"config"},
        "training": MODELS | {"config", "reference"},
        "building": MODELS | {"config", "generation"},
        "evaluation": MODELS | {"config", "generation"},
        "integrations": MODELS | {"reference", "training"},
        "review": MODELS | {"config", "evaluation"},
        "demo": EVERYTHING,
        "doctor": EVERYTHING | {"__init__"},  # its version
        "cli": EVERYTHING | {"config_file", "demo", "doctor", "recipe_file"},
        "__main__": {"cli"},
        "__init__": EVERYTHING,  # public names, loaded on first use
    },
    "realign_kernels": {
        "options": set[str](),
        "vocabulary": set[str](),
        "tiling": set[str](),
        "first_order": set[str](),
        "installation": set[str](),
        "head": set[str](),
        "validation": {"options", "vocabulary"},
        "data_parallel": {"options"},
        "sequences": {"validation"},
        "objective": {"validation"},
        "testing": {"objective"},  # for types: it shares no code
        "labels": {"validation"},
        "cells": {"validation"},
        "backends": {"head", "installation", "objective", "tiling"},
        "fused": {"backends", "head", "tiling", "vocabulary"},
        "ops": {"sequences", "objective", "validation", "options", "backends", "first_order"}
        | {"fused", "head", "tiling", "vocabulary"},
        "linear_logprob": {"ops", "options", "validation", "data_parallel"},
        "rdpo_loss": {"ops", "options", "validation", "data_parallel", "objective", "sequences"},
        "compat": {"linear_logprob", "rdpo_loss", "objective", "validation", "options"},
        "diagnosis": {"backends", "installation", "linear_logprob", "objective", "rdpo_loss"}
        | {"testing"},  # its formulas are what kernels are compared with
        "__main__": {"diagnosis"},
        "__init__": {"backends", "linear_logprob", "objective", "rdpo_loss"}
        | {"cells", "diagnosis", "installation", "labels"},
    },
}
# What a module may pull in of its package: lines of all files, comments and docstrings included.
MOST_LINES = {"realign.training.trainer": 3_700}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "yaml.load",
    "pickle.load",
    "pickle.loads",
    "urlopen",
}


def modules(package: str) -> dict[str, Path]:
    """Name to file of every module."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in ROOMS for name, path in modules(package).items()}


def imported(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Names that a file imports anywhere: modules where they are ours, else as they are written.

    Args:
        path: The file.
        for_types: Whether to include the imports that only a type checker makes.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
        if not for_types
    }
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} must import by absolute names, got a relative one."
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def room(module: str) -> tuple[str, str]:
    """The package and the room of a module."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0] or "__init__"


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_is_in_a_room_and_imports_only_allowed_rooms(package: str) -> None:
    table = ROOMS[package]
    assert not {room(name)[1] for name in modules(package)} - set(table)
    for name, path in modules(package).items():
        own = room(name)[1]
        for other in imported(path):
            if other.partition(".")[0] not in ROOMS:
                continue
            home, wanted = room(other)
            if home != package:
                assert wanted in realign_kernels.__all__ or other == home, (name, other)
                wanted = home
            assert wanted == own or wanted in table[own], f"{name} may not import {other}"


@pytest.mark.parametrize("package", ROOMS)
def test_imports_form_no_cycle(package: str) -> None:
    graph = {
        name: {other for other in imported(path) if other in MODULES and other != name}
        for name, path in modules(package).items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_room_tables_name_existing_rooms_without_cycles() -> None:
    for package, table in ROOMS.items():
        rooms = {room(name)[1] for name in modules(package)} | {"integrations"}
        assert set(table) <= rooms
        TopologicalSorter(table).prepare()


def closure(module: str) -> set[str]:
    """A module, the packages that it is in, and what they import, and so on."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        parts = name.split(".")
        packages = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        for found in {*packages} & MODULES.keys() - seen:
            seen.add(found)
            todo += imported(MODULES[found], for_types=False)
    return {name for name in seen if room(name)[0] == room(module)[0]}


@pytest.mark.parametrize(("module", "most"), MOST_LINES.items())
def test_the_lines_imported_by_a_module_stay_within_their_budget(module: str, most: int) -> None:
    lines = {name: len(MODULES[name].read_text().splitlines()) for name in closure(module)}
    assert sum(lines.values()) <= most, sorted(lines.items(), key=lambda item: -item[1])


def test_kernels_import_torch_alone() -> None:
    for name, path in modules("realign_kernels").items():
        others: tuple[str, ...] = ("transformers", "numpy")
        if not name.startswith("realign_kernels.backends.triton"):  # loaded at the first GPU call
            others = (*others, "triton")
        assert not [other for other in imported(path) if other.startswith(others)], name


def test_packages_do_not_import_tests_or_benchmarks() -> None:
    for path in MODULES.values():
        assert not [name for name in imported(path) if name.startswith(("tests", "benchmarks"))]


def test_locks_have_one_wrapper() -> None:
    libraries = {"fcntl", "filelock"}
    users = {name for name, path in MODULES.items() if libraries & {*imported(path)}}
    assert users == {"realign.runtime.lock"}


def test_no_module_has_a_catch_all_name() -> None:
    names = {path.name for path in MODULES.values()}
    assert not names & {"utils.py", "common.py", "helpers.py", "misc.py"}


def test_no_module_unpickles_evaluates_or_fetches() -> None:
    for path in MODULES.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & FORBIDDEN_CALLS, path
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path


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


def test_realign_exports_its_public_names() -> None:
    import realign

    assert realign.__all__ == [
        "Numerics",
        "PreferenceCollator",
        "RDPOConfig",
        "RDPOTrainer",
        "Record",
        "RefusedError",
        "Scoring",
        "TrainConfig",
        "add_adapter",
        "build_cache",
        "check_rows",
        "load_model",
        "load_processor",
        "read_cache",
        "read_records",
        "resolve_model",
        "train",
        "write_parquet",
    ]
    for name in realign.__all__:
        assert getattr(realign, name).__name__ == name
        assert f"realign.{name}" not in MODULES  # importing such a module would take the name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = realign.nothing


def test_no_source_file_is_ignored_by_git() -> None:
    files = [str(path) for path in MODULES.values()]
    command = ["git", "-c", "safe.directory=*", "check-ignore", *files]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (ignored.returncode, ignored.stdout) == (1, b"")
