"""`realign init`: a written file equals the recipe, explains every option, and replaces no file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from realign import recipe_file
from realign.cli import app
from realign.config import SECTIONS
from realign.config_file import inner_section, load_config
from realign.errors import RefusedError
from realign.recipe_file import recipe_lines, recipes, write_recipe

ROOT = Path(__file__).parents[2]
FLAGS = {"build": {"source": "s", "out": "o"}, "train": {"data": "d", "out": "o"}}
OPTION = re.compile(r"( +)# ([a-z_]+): (.*)")


def loaded(path: Path) -> dict[str, Any]:
    """The configuration of every section of a file."""
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: load_config(SECTIONS[name], path, (), FLAGS[name]) for name in sections}


def test_every_recipe_of_the_repository_is_listed() -> None:
    found = {*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes/families").glob("*.yaml")}
    assert {path.resolve() for path in recipes().values()} == found


@pytest.mark.parametrize("name", recipes())
def test_the_written_file_is_the_recipe(name: str, tmp_path: Path) -> None:
    path = write_recipe(name, tmp_path / "my.yaml")
    assert loaded(path) == loaded(recipes()[name])
    assert f"--config {path}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["paper", "paper-data"])
def test_unset_options_are_written_with_their_defaults(name: str, tmp_path: Path) -> None:
    path = write_recipe(name, tmp_path / "my.yaml")
    text = path.read_text(encoding="utf-8")
    (section,) = yaml.safe_load(text)
    assert 40 < max(map(len, text.partition(f"\n{section}:")[2].splitlines())) <= 100
    unset = OPTION.sub(r"\1\2: \3", text)
    required = r"^ +(\w+):  # required.*\n"
    (section,) = yaml.safe_load(text)
    wanted = [key for key, field in SECTIONS[section].model_fields.items() if field.is_required()]
    assert {*re.findall(required, unset, re.MULTILINE)} == {*wanted} - {"model"}
    path.write_text(re.sub(required, "", unset, flags=re.MULTILINE), encoding="utf-8")
    assert loaded(path) == loaded(recipes()[name])
    given = yaml.safe_load(path.read_text(encoding="utf-8"))[section]
    assert {*given} | FLAGS[section].keys() == SECTIONS[section].model_fields.keys()


def test_every_option_has_its_description_above_it(tmp_path: Path) -> None:
    text = write_recipe("paper", tmp_path / "my.yaml").read_text(encoding="utf-8")
    words = " ".join(text.replace("#", "").split())
    for key, field in SECTIONS["train"].model_fields.items():
        meaning = " ".join((field.description or "").replace("``", "").split())
        assert f"{meaning} {key}:" in words
        if key == "lora" and (inner := inner_section(field)):
            for name, option in inner.model_fields.items():
                assert " ".join((option.description or "").split()) in words
                assert re.search(rf"^    {name}: ", text, re.MULTILINE)


def test_existing_files_and_unknown_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    with pytest.raises(RefusedError, match=r"out must be a new file, got .*my\.yaml, which exists"):
        write_recipe("paper", path)
    assert path.read_text() == "mine"
    with pytest.raises(RefusedError, match=r"recipe must be one of .*qwen3-vl.*, got 'papers'"):
        write_recipe("papers", tmp_path / "other.yaml")
    assert [*tmp_path.iterdir()] == [path]


def test_recipes_of_an_installed_wheel_are_found(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "realign" / "recipes" / "families").mkdir(parents=True)
    (tmp_path / "realign" / "recipes" / "own.yaml").write_text("# One.\ntrain: {beta: 0.2}\n")
    monkeypatch.setattr(recipe_file, "__file__", str(tmp_path / "realign" / "recipe_file.py"))
    assert recipe_lines() == ["own", "    One"]
    assert "  beta: 0.2" in write_recipe("own", tmp_path / "my.yaml").read_text().splitlines()


def test_the_init_command_lists_and_writes_recipes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["init", *arguments])
        return result.exit_code, result.output

    code, listed = run()
    assert code == 0
    assert [line for line in listed.splitlines() if not line.startswith(" ")] == [*recipes()]
    assert max(map(len, listed.splitlines())) <= 80
    assert run("paper") == (0, "paper -> paper.yaml\n")
    assert run("paper", "--out", "runs/my.yaml") == (0, "paper -> runs/my.yaml\n")
    code, output = run("paper")
    assert (code, "which exists. Name another one with --out" in " ".join(output.split())) == (
        2,
        True,
    )
    code, output = run("--out", "x.yaml")
    assert (code, "requires a recipe" in output) == (2, True)
    assert sorted(path.name for path in tmp_path.rglob("*.yaml")) == ["my.yaml", "paper.yaml"]
