"""Prompts of judges: templates with named placeholders, which an answer and its question fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark
from realign.generation.generator import Request
from realign.runtime.files import content_sha256, read_utf8

FOLDER = Path(__file__).with_name("judge_prompts")
VERSION = 1  # of all prompts of this project, raised with any change of their texts
USER_LINE = "--- user ---"  # separates the system turn from the user's turn


@dataclass(frozen=True)
class JudgePrompt:
    """The text that a judge is sent about an answer.

    Attributes:
        name: Name in the scores. The prompt of a file is never named like a built-in one, even if
            the texts are equal.
        system: Template of the system turn; empty for none.
        user: Template of the user's turn.
        defaults: Placeholder to its text if the benchmark's files have none.
    """

    name: str
    system: str
    user: str
    defaults: Mapping[str, str]

    def request(self, values: Mapping[str, str], reminder: str = "") -> Request:
        """Return the request about an answer.

        Args:
            values: Placeholder to text.
            reminder: Text to append to the user's turn.
        """
        given = {**self.defaults, **values}
        system, user = self.system.format_map(given), self.user.format_map(given)
        return Request(user + reminder, None, system)

    def sha256(self, values: Mapping[str, str]) -> str:
        """Return the hash of the prompt without the answer and its question."""
        rules = [values.get(name, text) for name, text in self.defaults.items()]
        return content_sha256(self.system, self.user, *rules)


def read_prompt(benchmark: Benchmark, path: Path | None) -> JudgePrompt:
    """Read the prompt of a benchmark's judge from a file, or this project's.

    A file holds the user's turn. Text above a line ``--- user ---`` is a system turn.

    Raises:
        RefusedError: The file is not UTF-8, or has not exactly the placeholders of the benchmark.
    """
    assert benchmark.judge is not None
    source = path or FOLDER / f"{benchmark.name}.txt"
    if not source.is_file():
        raise RefusedError(f"prompt must be a file, got {source}, which is none. Check --prompt.")
    text = read_utf8(source).removeprefix("\ufeff").removesuffix("\n")
    before, line, after = text.partition(f"{USER_LINE}\n")
    system, user = (before.strip(), after) if line else ("", text)
    names = benchmark.judge.placeholders
    found = [*_placeholders(system, source, names), *_placeholders(user, source, names)]
    if missing := [name for name in names if name not in found]:
        raise RefusedError(
            f"{source} must have the placeholders {_braces(names)} of {benchmark.title}, "
            f"{_braces(missing)} is missing. Put it where its text belongs."
        )
    defaults = {
        name: read_utf8(own).removesuffix("\n")
        for name in names
        if (own := FOLDER / f"{benchmark.name}-{name}.txt").is_file()
    }
    name = f"file {source.name}" if path else f"realign {benchmark.name} {VERSION}"
    return JudgePrompt(name, system, user, defaults)


def _placeholders(text: str, source: Path, names: Sequence[str]) -> list[str]:
    """Return the placeholders of a template.

    Raises:
        RefusedError: One is unknown, or a brace is alone.
    """
    try:
        pieces = [(name, spec, kind) for _, name, spec, kind in Formatter().parse(text)]
    except ValueError as error:
        raise RefusedError(
            f"{source} must have braces around placeholders alone, got others ({error}). Double a "
            "brace that is part of the text."
        ) from None
    found = [(name, spec or kind) for name, spec, kind in pieces if name is not None]
    for name, has_more in found:
        if name not in names or has_more:
            more = " with a format" if has_more else ""
            raise RefusedError(
                f"{source} must have no placeholders but {_braces(names)}, got {{{name}}}{more}. "
                "Correct it, or double the braces if they are part of the text."
            )
    return [name for name, _ in found]


def _braces(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
