"""Every family has a recipe that `realign train` reads, and a row in the table of families."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from realign.config import TrainConfig
from realign.config_file import load_config
from tests.realign.modeling.families.registry import FAMILIES, SEPARATE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "families.md").read_text(encoding="utf-8")
RECIPES = {path.stem: path for path in (ROOT / "recipes" / "families").glob("*.yaml")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_recipe_has_the_adapter_settings_of_the_paper(name: str) -> None:
    config = load_config(TrainConfig, RECIPES[name], flags={"data": "d", "out": "o"})
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (128, 256, "all-linear")
    assert config.max_length is not None
    assert f"recipes/families/{name}.yaml" in RECIPES[name].read_text(encoding="utf-8")


def test_every_recipe_belongs_to_a_known_family() -> None:
    assert RECIPES.keys() == FAMILIES.keys()


def test_the_table_lists_exactly_the_supported_families() -> None:
    rows = re.findall(r"^\| `(.+?)` \| .+? \| (yes|no)\b", PAGE, re.MULTILINE)
    assert dict(rows) == dict.fromkeys(FAMILIES, "yes") | dict.fromkeys(SEPARATE, "no")


def test_the_page_states_the_number_of_families_and_recipes() -> None:
    text = " ".join(PAGE.split())
    assert f"There are {len(FAMILIES) + len(SEPARATE)} families in the table." in text
    assert f"{len(RECIPES)} of them share the prefix of a pair and have a recipe" in text
    assert f"The {len(RECIPES)} recipes in" in text
