"""Recipes as YAML files to start from: every option with its meaning, those that the recipe sets
with its values, the others commented out with their defaults.

The recipes are the files of the repository's folder ``recipes``, which a wheel holds as
``realign/recipes``; meanings and defaults are those of :mod:`realign.config`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from realign.config import SECTIONS
from realign.config_file import inner_section, options
from realign.errors import RefusedError
from realign.runtime.files import read_utf8, write_text
from realign.runtime.run_folder import check_out

WIDTH = 100
PLACES = ("*.yaml", "families/*.yaml")  # presets of accelerate are not recipes


def recipes() -> dict[str, Path]:
    """Return name to file of every recipe, those for one family of models last."""
    package = Path(__file__).parent
    folder = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return {path.stem: path for place in PLACES for path in sorted(folder.glob(place))}


def recipe_lines() -> list[str]:
    """Return the name of every recipe and, below it, the first sentence of its comment."""
    lines = []
    for name, path in recipes().items():
        text = " ".join(itertools.takewhile(lambda line: line[:1] not in ("", " "), _header(path)))
        sentence = text.partition(". ")[0].rstrip(".:")
        lines += [
            name,
            *textwrap.wrap(sentence, 76, initial_indent="    ", subsequent_indent="    "),
        ]
    return lines


def write_recipe(name: str, out: Path) -> Path:
    """Write a recipe with comments and return the path of the file, which gives the same
    configuration as the recipe itself.

    Args:
        name: One of :func:`recipes`.
        out: New file.
    Raises:
        RefusedError: There is no such recipe, or ``out`` exists.

    Example:
        >>> write_recipe("paper", Path("my.yaml"))  # doctest: +SKIP
    """
    if name not in recipes():
        raise RefusedError(
            f"recipe must be one of {', '.join(recipes())}, got {name!r}. `realign init` describes "
            "them."
        )
    if out.exists():
        raise RefusedError(
            f"out must be a new file, got {out}, which exists. Name another one with --out."
        )
    check_out(out.parent)
    path = recipes()[name]
    folder = "recipes/families" if path.parent.name == "families" else "recipes"
    header = [line.replace(f"{folder}/{path.name}", str(out)) for line in _header(path)]
    lines = [
        *(f"# {line}".rstrip() for line in header),
        "#",
        "# Options that are commented out show their default values.",
    ]
    for section, values in yaml.safe_load(read_utf8(path)).items():
        lines += [f"{section}:", *_section(SECTIONS[section], values, "  ")]
    write_text(out, "\n".join(lines) + "\n")
    return out


def _header(path: Path) -> list[str]:
    """Return the comment at the top of a recipe."""
    lines = []
    for line in read_utf8(path).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def _section(section: type[BaseModel], values: Mapping[str, Any], indent: str) -> Iterator[str]:
    heading = ""
    for group, key, field in options(section):
        if group != heading:
            heading = group
            yield f"\n{indent}# ---- {group}"
        yield ""
        meaning = " ".join((field.description or "").replace("``", "").split())
        yield from textwrap.wrap(
            meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        inner = inner_section(field)
        if key in values and inner and isinstance(values[key], dict):
            yield f"{indent}{key}:"
            yield from _section(inner, values[key], f"{indent}  ")
        elif key in values:
            yield f"{indent}{key}: {_yaml(values[key])}"
        elif field.is_required():
            yield f"{indent}# {key}:  # required, here or as a flag"
        else:
            yield f"{indent}# {key}: {_yaml(_default(field))}"


def _default(field: FieldInfo) -> Any:
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
