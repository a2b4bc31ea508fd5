"""Decision notes have one form of heading, with the number of the file, and a place on the site."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT

NOTES = {
    page.removeprefix("docs/"): text
    for page, text in PAGES.items()
    if page.startswith("docs/decisions/")
}


@pytest.mark.parametrize("note", NOTES)
def test_a_heading_begins_with_the_number_of_the_file(note: str) -> None:
    number = re.fullmatch(r"decisions/(\d{3})-[a-z0-9-]+\.md", note)
    assert number
    assert re.match(rf"# {number[1]}: \S.*\n\n\*\*Context\.\*\* ", NOTES[note])


def test_the_navigation_lists_every_note_in_order() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- .+: (decisions/.+\.md)$", settings, re.MULTILINE)
    assert listed == [*NOTES]
    assert [int(note[len("decisions/") :][:3]) for note in listed] == [*range(1, len(listed) + 1)]
