"""Files that a code host, a package index or a contributor's programs read are true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import realign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_has_this_version_and_the_paper() -> None:
    citation = read("CITATION.cff")
    assert citation.keys() >= {
        "cff-version",
        "title",
        "message",
        "authors",
    }  # what CFF 1.2 requires
    assert citation["version"] == realign.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "realign contributors"}]
    (paper,) = citation["references"]
    assert len(paper["authors"]) == 9
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert f"## [{citation['version']}] - {citation['date-released']}" in CHANGELOG


def test_pre_commit_hooks_equal_the_lint_commands_and_are_local() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    hooks = {re.sub(r" --[\w-]+", "", hook["entry"]) for hook in repository["hooks"]}
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2]
    lines = re.findall(r"^\t\$\(BIN\)/(\w+(?: \w+)?)", lint.partition("\n\n")[0], re.MULTILINE)
    assert hooks == {f"python -m {line}" for line in lines}
    assert len(hooks) == 3


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_follow_the_github_schema(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() >= {"name", "description", "body"}
    for element in form["body"]:
        assert element["type"] in ("markdown", "textarea")
        assert "value" in element["attributes"] or {"id", "attributes"} <= element.keys()


def test_metadata_list_every_supported_python() -> None:
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    named = [
        int(minor)
        for line in PROJECT["classifiers"]
        for minor in re.findall(r"Python :: 3\.(\d+)$", line)
    ]
    assert named == [*range(int(low), int(high))]
    kernels = (ROOT / "distributions/realign-kernels/pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(kernels)["project"]["classifiers"] == PROJECT["classifiers"]


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    versions = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", line) for line in versions[1:])
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for section in re.split(r"^## .*$", CHANGELOG, flags=re.MULTILINE)[1:]:
        named = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert len({*named}) == len(named)
        assert {*named} <= {*kinds}
