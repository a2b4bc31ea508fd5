"""The README is true: its Python runs, its options exist, its table is the result file's."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import realign
import realign.evaluation
import realign.integrations.trl
import realign_kernels.compat
from realign.config import SECTIONS, BuildConfig
from realign.config_file import load_config

ROOT = Path(__file__).parents[1]
BUILD_FLAGS = {"source": "s", "out": "o"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "distributions/realign-kernels/README.md"])
def test_python_blocks_run(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        command = [sys.executable, "-W", "error", "-c", block]
        run = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if "2 ln 2" in block:
            assert float(run.stdout) == pytest.approx(2 * math.log(2), abs=1e-5)


def test_recipes_are_configurations() -> None:
    config = load_config(BuildConfig, ROOT / "recipes/paper-data.yaml", flags=BUILD_FLAGS)
    assert (config.top_k, config.threshold) == (10, 0.95)  # the paper's
    pages = README + (ROOT / "docs/guides/training.md").read_text(encoding="utf-8")
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{recipe.name}" in pages
        for section in yaml.safe_load(recipe.read_text()):
            flags = BUILD_FLAGS if section == "build" else {"data": "d", "out": "o", "model": "m"}
            load_config(SECTIONS[section], recipe, flags=flags)


def test_examples_of_building_are_configurations() -> None:
    page = (ROOT / "docs/guides/building.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    example = yaml.safe_load(block)["build"]
    BuildConfig(**example, source="s", out="o")


def test_commands_that_train_7b_train_adapters() -> None:
    commands = re.findall(r"realign train +((?:.*\\\n)*.*)", README)
    recipes = {
        name for command in commands for name in re.findall(r"recipes/[\w-]+\.yaml", command)
    }
    assert recipes == {"recipes/paper.yaml"}
    for recipe in ("recipes/paper.yaml", "recipes/authors-code.yaml"):
        assert recipe in README
        lora = yaml.safe_load((ROOT / recipe).read_text())["train"]["lora"]
        assert (lora["r"], lora["alpha"]) == (128, 256)


def test_tables_equal_those_made_from_the_result_files() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.tables import BLOCKS, PAGES, with_tables

    text = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    for page, content in text.items():
        assert with_tables(content) == content, page
    for begin, end in BLOCKS:
        assert sum(begin in content and end in content for content in text.values()) == 1


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_linked_files_exist() -> None:
    titles = {
        "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        assert path or anchor in titles, target


def test_readme_docs_and_examples_import_only_public_names() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    packages = (realign, realign.evaluation, realign.integrations.trl, realign_kernels)
    public = {package.__name__: {*package.__all__} for package in packages}
    # what examples train on where they are given nothing
    public |= {"realign.demo.drawing": {"draw"}, "realign.demo.run": {"MODEL"}}
    public["realign.demo.world"] = {"DESCRIBE", "free_scene"}
    for entry in pkgutil.iter_modules(realign_kernels.compat.__path__, "realign_kernels.compat."):
        names = vars(importlib.import_module(entry.name)).items()
        own = {name for name, value in names if getattr(value, "__module__", "") == entry.name}
        public[entry.name] = {name for name in own if not name.startswith("_")}
    imports = r"^ *(?:from|import) (realign\S*)(?: import (\([^)]*\)|.*))?$"
    seen: set[str] = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"```python\n# realign/.*?```", "", text, flags=re.DOTALL)  # a file of ours
        for package, names in re.findall(imports, text, re.MULTILINE):
            words = {*re.findall(r"\w+", names)}
            assert package in public, (page, package)
            assert words <= public[package], (page, words)
            seen |= {package, *words}
        if page.suffix == ".py":
            used = {*re.findall(r"\brealign\.(\w+)", re.sub(imports, "", text, flags=re.MULTILINE))}
            assert used <= public["realign"], page
            seen |= used
    assert seen >= {
        "realign",
        "realign_kernels",
        "train",
        "TrainConfig",
        "rdpo_loss",
        "RDPOTrainer",
    }


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_every_proof_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
    kernels, training = text.split("## Cache and training")
    for part, folder, at_least in ((kernels, "realign_kernels", 30), (training, "realign", 28)):
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", part)
        assert len(named) >= at_least
        for file, test in named:
            found = [path.read_text() for path in (ROOT / "tests" / folder).rglob(file)]
            assert any(f"def {test}(" in source for source in found), (file, test)
