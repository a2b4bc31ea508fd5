"""The rows of a dataset for browsing, and their decisions.

Facts to sort and filter by are kept in memory; texts and images are read when a page shows them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from realign.data.decisions import (
    Decision,
    RowKey,
    append_decision,
    read_decisions,
    read_history,
    undo_decision,
)
from realign.data.records import Record, texts_of
from realign.errors import RefusedError
from realign.review.pair_view import PairFacts
from realign.runtime.progress import Progress

SORTS = ("index", "similarity", "cosine", "rank", "words")
STATUSES = ("undecided", "keep", "drop", "flag")


@dataclass(frozen=True)
class Query:
    """Filters and order of the rows that a page shows.

    Attributes:
        sort: One of ``SORTS``, with ``-`` before it for high values first.
        status: One of ``STATUSES``, or empty for all rows.
        reason: Reason for which an earlier candidate of the row was refused; empty for any.
        least: Lowest similarity of the answers.
        most: Highest similarity of the answers.
        rank: Rank of the retrieved image.
        find: Part of the row's id.
    """

    sort: str = "index"
    status: str = ""
    reason: str = ""
    least: float | None = None
    most: float | None = None
    rank: int | None = None
    find: str = ""


@dataclass(frozen=True)
class Page:
    """One page of the rows of a query.

    Attributes:
        rows: Their numbers in the dataset.
        total: How many fit in all.
        before: How many of these come before.
        previous: Where the page before it starts among the sorted rows of any status, so that
            deciding about rows moves no other row to another page; None for the first page.
        next: Where the next page starts; None for the last page.
    """

    rows: Sequence[int]
    total: int
    before: int
    previous: int | None
    next: int | None


@dataclass(frozen=True)
class Undone:
    """A decision that was taken back.

    Attributes:
        number: The row's number in the dataset.
        decision: Decision that was taken back.
        now: Earlier decision that counts again; None if the row is undecided.
    """

    number: int
    decision: Decision
    now: Decision | None


class Rows:
    """Rows and their decisions, safe to use from a server's threads.

    Args:
        records: Rows of the dataset.
        decisions: Decision file.
        reasons: Row id to the reasons for which earlier candidates were refused.
    """

    def __init__(
        self,
        records: Sequence[Record],
        decisions: Path,
        reasons: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._records, self._path = records, decisions
        self._tried = reasons or {}
        self.facts: list[PairFacts] = []
        self._numbers: dict[str, list[int]] = {}
        texts = texts_of(records)
        with Progress("open", len(records)) as progress:
            for number in range(len(records)):
                self.facts.append(self._read_facts(texts, number))
                progress.advance()
        self.reasons = sorted({name for found in self._tried.values() for name in found})
        self.ranks = sorted({fact.rank for fact in self.facts if fact.rank is not None})
        self._keys: dict[int, str] = {}
        self._statuses: dict[int, Decision] = {}
        self._seen: tuple[int, int] | None = None
        self._lock = RLock()  # reading a record moves the reader's place in the file
        self._refresh()

    def _read_facts(self, texts: Sequence[Record], number: int) -> PairFacts:
        try:
            fact = PairFacts.of(texts[number])
        except RefusedError as error:  # :meth:`record` raises it again when the row is shown
            place = str(error).partition(": ")[0]
            return PairFacts(place, None, None, None, words=0, rejected_words=0)
        self._numbers.setdefault(fact.id, []).append(number)
        return fact

    def __len__(self) -> int:
        return len(self.facts)

    def record(self, number: int) -> Record:
        """Read one row.

        Raises:
            RefusedError: It is damaged.
        """
        with self._lock:
            return self._records[number]

    def tried(self, number: int) -> tuple[str, ...]:
        """Return the reasons for which earlier candidates of a row were refused."""
        return self._tried.get(self.facts[number].id, ())

    def decision(self, number: int) -> Decision | None:
        """Return the decision about a row with its present content."""
        with self._lock:
            return self._statuses.get(number)

    def decide(self, number: int, key: str, decision: str, note: str) -> bool:
        """Write a decision; return False without writing if the row's key is no longer ``key``."""
        with self._lock:
            self._refresh()  # a damaged file is found before anything is added to it
            if key != self._key(number):
                return False
            append_decision(self._path, Decision(self.facts[number].id, key, decision, note))
            self._refresh()
            return True

    def undo(self) -> Undone | None:
        """Take back the last decision about a row of this dataset; return None without one.

        The decision may have been made before this server started, or by another program.
        """
        with self._lock:
            while last := self._last_decision():
                number, decision = last
                if undo_decision(self._path, decision):  # else another program decided meanwhile
                    self._refresh()
                    return Undone(number, decision, self._statuses.get(number))
            return None

    def _last_decision(self) -> tuple[int, Decision] | None:
        for decision in reversed(read_history(self._path)):
            for number in self._numbers.get(decision.id, ()):
                with suppress(RefusedError):  # a row that cannot be read has no decision
                    if self._key(number) == decision.key:
                        return number, decision
        return None

    def counts(self) -> dict[str, int]:
        """Return the number of rows by status."""
        with self._lock:
            self._refresh()
            found = Counter(decision.decision for decision in self._statuses.values())
            found["undecided"] = len(self.facts) - found.total()
            return {status: found[status] for status in STATUSES}

    def page(self, query: Query, start: int, size: int) -> Page:
        """Return one page of a query.

        Args:
            query: Filters and order of the rows.
            start: Place among the sorted rows from which the page starts.
            size: Largest number of rows of the page.
        """
        with self._lock:
            self._refresh()
            order = self._order(query)
            fits = [place for place, number in enumerate(order) if self._has_status(number, query)]
        before = sum(place < start for place in fits)
        shown = fits[before : before + size]
        more = before + size < len(fits)
        return Page(
            [order[place] for place in shown],
            len(fits),
            before,
            fits[max(0, before - size)] if before else None,
            fits[before + size] if more else None,
        )

    def _order(self, query: Query) -> list[int]:
        numbers: Iterable[int] = (n for n in range(len(self.facts)) if self._fits(n, query))
        name = query.sort.removeprefix("-")
        if name == "index":
            ordered = list(numbers)
            return ordered[::-1] if query.sort != name else ordered
        sign = -1 if query.sort != name else 1

        def place(number: int) -> tuple[bool, float, int]:
            value = getattr(self.facts[number], name)
            return (value is None, 0 if value is None else sign * value, number)

        return sorted(numbers, key=place)

    def _fits(self, number: int, query: Query) -> bool:
        fact = self.facts[number]
        value = fact.similarity
        return (
            query.find in fact.id
            and (query.rank is None or fact.rank == query.rank)
            and (query.least is None or (value is not None and value >= query.least))
            and (query.most is None or (value is not None and value <= query.most))
            and (not query.reason or query.reason in self.tried(number))
        )

    def _has_status(self, number: int, query: Query) -> bool:
        decision = self._statuses.get(number)
        return query.status in ("", decision.decision if decision else "undecided")

    def _key(self, number: int) -> str:
        """Return the hash of a row's content, images included."""
        if number not in self._keys:
            self._keys[number] = self._records[number].key
        return self._keys[number]

    def _refresh(self) -> None:
        """Read the decision file again if it changed, since other programs may write to it."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._statuses, self._seen = {}, None
            return
        seen = (status.st_mtime_ns, status.st_size)
        if seen == self._seen:
            return
        decisions = read_decisions(self._path)
        ids = {row.id for row in decisions}
        self._statuses = {}
        for number in sorted(n for row_id in ids for n in self._numbers.get(row_id, ())):
            with suppress(RefusedError):  # a row that cannot be read has no decision
                row = RowKey(self.facts[number].id, self._key(number))
                if row in decisions:
                    self._statuses[number] = decisions[row]
        self._seen = seen
