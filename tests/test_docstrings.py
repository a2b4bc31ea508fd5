"""Rules of language that ruff lacks: the beginnings of docstrings, and names without meaning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("realign", "realign_kernels")
FOLDERS = (*PACKAGES, "benchmarks", "examples")
# a summary says what something is or does: "Return whether ...", not "Whether ..."
NO_BEGINNINGS = {"How", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why"}
EMPTY_NAMES = {"held", "said", "there", "told", "what"}


def trees(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield every file of a folder and its syntax tree."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def wrong_beginnings(tree: ast.Module) -> Iterator[str]:
    """Yield the first lines of docstrings, also those of attributes, that begin with a question."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            summary = str(node.value.value).strip().partition("\n")[0]
            if summary.split(" ")[0].rstrip(",.:") in NO_BEGINNINGS:
                yield summary


def empty_names(tree: ast.Module) -> Iterator[str]:
    """Yield where a variable or an argument gets a name without content."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            name = node.id if isinstance(node.ctx, ast.Store) else ""
        else:
            name = node.arg if isinstance(node, ast.arg) else ""
        if name in EMPTY_NAMES:
            yield f"{name} in line {node.lineno}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    found = [(path, line) for path, tree in trees(folder) for line in wrong_beginnings(tree)]
    assert not found


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_variable_names_are_not_empty_words(folder: str) -> None:
    assert not [(path, name) for path, tree in trees(folder) for name in empty_names(tree)]


def test_the_docstring_rules_find_violations() -> None:
    source = '"""What."""\ndef tell(what):\n    "How: it."\n    return [said for said in what]\n'
    attribute = 'class Rule:\n    strips: bool\n    """Whether to strip."""\n'
    found = [*wrong_beginnings(ast.parse(source + attribute))]
    assert sorted(found) == ["How: it.", "What.", "Whether to strip."]
    assert len([*empty_names(ast.parse(source))]) == 2
