"""The protocol of generators, which turn requests into answers wherever the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    is_cut: bool = False  # stopped by the limit on its length, not by an end-of-turn token
    problem: str = ""  # why this request can have no answer (a server refused it); empty normally
    num_tokens: int | None = None  # before the end-of-turn token, where they were counted

    @property
    def short_problem(self) -> str:
        """The kind of problem, for counting; the server's message differs between requests."""
        return self.problem.partition(":")[0]


class Request(NamedTuple):
    """One user turn about one image file, or about none."""

    prompt: str
    image: Path | None
    system: str = ""  # text of a system turn before it, which only servers are sent


class Generator(Protocol):
    """Generator of answers, by a model in this process or by a server."""

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer each request, in order. The same requests in the same order give the same
        answers.
        """
        ...
