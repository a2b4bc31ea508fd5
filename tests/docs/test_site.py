"""The documentation site builds without a warning, is complete, and loads nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import realign
import realign.evaluation
import realign.integrations.trl
import realign_kernels
from realign.config import SECTIONS
from tests.docs.pages import PAGES, ROOT

# elements that a browser fetches by itself, and the attribute with the address
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
PUBLIC = {
    "realign_kernels": realign_kernels,
    "realign": realign,
    "evaluation": realign.evaluation,
    "trl": realign.integrations.trl,
}


class Fetches(HTMLParser):
    """The addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("rel") not in ("canonical", "next", "prev"):
            self.found += [values[FETCHED[tag]] or ""] if FETCHED.get(tag) in values else []


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(out)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("page", PUBLIC)
def test_the_reference_has_every_public_name(page: str) -> None:
    shown = re.findall(r"^::: ([\w.]+)$", PAGES[f"docs/reference/{page}.md"], re.MULTILINE)
    assert len(shown) == len(set(shown))
    elsewhere = {"TrainConfig"} if page == "realign" else set()  # among the configurations
    names = {path.rpartition(".")[2] for path in shown} | elsewhere
    assert names == {*PUBLIC[page].__all__}


def test_the_reference_has_every_section_of_the_configuration() -> None:
    shown = re.findall(
        r"^::: realign.config.(\w+)$", PAGES["docs/reference/configuration.md"], re.M
    )
    assert {section.__name__ for section in SECTIONS.values()} <= {*shown}


def test_no_page_loads_a_script_from_another_host() -> None:
    assert not [page for page, text in PAGES.items() if "```mermaid" in text]
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings


@pytest.mark.full
def test_the_site_builds_with_every_page(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    sources = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    renamed = {
        page.removesuffix("README.md") + "index" * page.endswith("README.md") for page in sources
    }
    assert pages >= {page.removesuffix(".md") + ".html" for page in renamed}
    for page in pages:
        reader = Fetches()
        reader.feed((tmp_path / page).read_text(encoding="utf-8"))
        assert reader.found
        assert not [address for address in reader.found if re.match(r"\w+:|//", address)], page
    reference = (tmp_path / "reference" / "realign_kernels.html").read_text(encoding="utf-8")
    assert "Return the log-probability of each label" in reference
    assert ":func:" not in reference
    assert "Example::" not in reference
    assert all(f">{name}:</span>" in reference for name in ("Returns", "Raises", "Examples"))
    assert 'href="#realign_kernels.rdpo_loss.rdpo_loss"' in reference  # from a docstring
    trainer = (tmp_path / "reference" / "realign.html").read_text(encoding="utf-8")
    assert "KL strength of the answer pair." in trainer  # from the metadata of a field
    assert "Learning rate of the projector" in trainer
    assert "Unreleased" in (tmp_path / "changelog.html").read_text(encoding="utf-8")


@pytest.mark.full
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[gone](gone.md)\n")
    settings = {"site_name": "broken", "theme": "material", "docs_dir": "docs"}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    broken = build(tmp_path / "out", tmp_path / "mkdocs.yml")
    assert broken.returncode != 0
    assert "gone.md" in broken.stderr
