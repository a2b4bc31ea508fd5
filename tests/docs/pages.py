"""The pages of the documentation, their blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "distributions").glob("*/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line of ``realign``.

    Attributes:
        page: Where it stands.
        words: Its words, without the program and without a launcher before it.
        is_whole: Whether it can be given as it stands: it is in a block and leaves nothing out.
    """

    page: str
    words: tuple[str, ...]
    is_whole: bool

    def __str__(self) -> str:
        return f"{self.page}: realign {' '.join(self.words)}"


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return [body for kind, body in FENCED.findall(PAGES[page]) if kind == language]


def python_blocks() -> list[tuple[str, int]]:
    """Return page and number, from 1, of every block of Python."""
    return [(page, i + 1) for page in PAGES for i in range(len(blocks(page, "python")))]


def commands() -> list[Command]:
    """Return every command line of every page: those in blocks, indented ones, and inline code."""
    found = []
    for page, text in PAGES.items():
        fenced = [*blocks(page, "sh"), *blocks(page, "")]
        indented = re.findall(r"^    (realign .*(?:\\\n.*)*)", text, re.MULTILINE)
        for block in (*fenced, *indented):
            for line in block.replace("\\\n", " ").splitlines():
                if words := _words(line):
                    found.append(Command(page, words, "..." not in words))
        prose = FENCED.sub("", text)
        for span in re.findall(r"(?<!`)`(realign [^`]+)`(?!`)", prose):
            if words := _words(span):
                found.append(Command(page, words, is_whole=False))
    return found


def _words(line: str) -> tuple[str, ...]:
    """Return the words after ``realign`` in a line, if any; a launcher may stand before it."""
    if "realign" not in line:
        return ()
    words = shlex.split(line, comments=True)
    if words[:1] == ["realign"]:
        return tuple(words[1:])
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1 : i + 2] in (["realign"], ["realign.cli"]):
            return tuple(words[i + 2 :])
    return ()
