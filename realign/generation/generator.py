"""The protocol of generators, which answer requests with a model in this process or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    """One generated answer.

    Attributes:
        text: The text.
        is_cut: Whether it was stopped by the limit on its length, not by an end-of-turn token.
        problem: Reason why the request has no answer, such as a refusal by the server; or empty.
        num_tokens: Number of tokens before the end-of-turn token, if they were counted.
    """

    text: str
    is_cut: bool = False
    problem: str = ""
    num_tokens: int | None = None

    @property
    def short_problem(self) -> str:
        """Kind of the problem, without the server's message, so that problems can be counted."""
        return self.problem.partition(":")[0]


class Request(NamedTuple):
    """One user turn, with or without an image file."""

    prompt: str
    image: Path | None
    system: str = ""  # text of a system turn, which is sent to servers only


class Generator(Protocol):
    """Generator of answers, by a model in this process or by a server."""

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer each request, in order. The same requests in the same order give the same
        answers.
        """
        ...
