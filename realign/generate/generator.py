"""What the pipeline asks of a model, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from realign.generate.answer import Answer


class Request(NamedTuple):
    """One user turn about one image file."""

    prompt: str
    image: Path


class Generator(Protocol):
    """Answers requests: a model in this process, or a server."""

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer each request, in order. The same requests in the same order give the same
        answers.
        """
        ...
