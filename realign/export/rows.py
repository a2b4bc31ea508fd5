"""Files of rows, written as the rows come; for folders that appear as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_list(path: Path, rows: Iterable[Any]) -> int:
    """Write a JSON list, one row a line; return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(("[\n" if not count else ",\n") + json.dumps(row, ensure_ascii=False))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def write_lines(path: Path, rows: Iterable[Any]) -> int:
    """Write JSON lines; return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
