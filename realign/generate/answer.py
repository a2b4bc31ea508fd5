"""What a generator says, and whether it was able to finish."""

from __future__ import annotations

from typing import NamedTuple


class Answer(NamedTuple):
    """One generated answer."""

    text: str
    is_cut: bool = False  # stopped by the limit on its length, not by an end-of-turn token
    problem: str = ""  # why this request can have no answer (a server refused it); empty normally

    @property
    def short_problem(self) -> str:
        """The kind of problem, which can be counted; what the server said differs by request."""
        return self.problem.partition(":")[0]
