"""10,000 mutated rows: each is read as written, or refused by line, code and remedy."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from realign.data.formats.official import read_official_rows
from realign.data.records import content_problems, special_tokens
from realign.errors import RefusedError
from realign.runtime.strict_json import iter_jsonl

ROWS = 5_000  # as lines of bytes, and as many as parsed values


def row(rng: Random) -> dict[str, Any]:
    words = ["a dog", "two cats", "é", "\U0001f600", "<b>", "日本", "\\", '"', "{", "\u2028", " "]
    turn = {"role": "user", "content": "<image>\n" + " ".join(rng.choices(words, k=4))}
    answers = [f"There is {number} {' '.join(rng.choices(words, k=5))}." for number in (1, 2)]
    return {
        "id": str(rng.randrange(10**6)),
        "image": "a.png",
        "retrieved_image": "b.png",
        "chosen": [turn, {"role": "assistant", "content": answers[0]}],
        "rejected": [turn, {"role": "assistant", "content": answers[1]}],
    }


def mutated(raw: bytes, rng: Random) -> bytes:
    """A line with one to three changes of bytes, none of them a line's end."""
    line = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(line) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            del line[at:]
        elif kind == 1:
            del line[at : at + rng.randrange(1, 30)]
        elif kind == 2:
            line[at:at] = rng.randbytes(rng.randrange(1, 4))
        elif kind == 3 and at < len(line):
            line[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            line[at:at] = rng.choice([b"NaN", b"1e400", b"\\ud800", b"\xed\xa0\x80", b"\0", b"[["])
        elif kind == 5:
            line[at:at] = line[rng.randrange(len(line) + 1) :][: rng.randrange(1, 200)]
        else:
            line += rng.choice([b"}", b" 1", b",", b'{"a": 1, "a": 1}', b"// x"])
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


def is_strict(line: bytes) -> bool:
    """Return whether a line is allowed, decided without the reader's own means: it is valid, and
    writing what was read gives the same text again, spaces and escapes aside.
    """
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False

    def count_keys(value: Any) -> int:
        if isinstance(value, dict):
            return len(value) + sum(map(count_keys, value.values()))
        return sum(map(count_keys, value)) if isinstance(value, list) else 0

    # outside of strings, every colon belongs to a key
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    return outside.count(":") == count_keys(value)


def test_mutated_lines_are_read_or_refused(tmp_path: Path) -> None:
    rng = Random(0)
    batch = [mutated(json.dumps(row(rng), ensure_ascii=bool(rng.randrange(2))).encode(), rng)
             for _ in range(ROWS)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(batch) + b"\n")
    accepted, codes = 0, set()
    found = list(iter_jsonl(path))
    assert [number for number, _ in found] == [*range(1, ROWS + 1)]
    for (number, value), line in zip(found, batch, strict=True):
        if isinstance(value, RefusedError):
            assert not is_strict(line), (line, value)
            assert str(value).startswith(f"rows.jsonl, line {number}")
            codes.add(value.code)
        else:
            assert is_strict(line), line
            assert value == json.loads(line)
            accepted += 1
    assert 200 < accepted < ROWS - 200
    assert codes >= {"json", "utf-8", "duplicate-key", "number", "surrogate"}


VALUES: list[Any] = [
    *(None, 0, -1, 1.5, True, "", " ", "x", "\0", [], {}, [[]], [None], ["x"], {"role": "user"}),
    *("../a.png", "http://a/b.png", "gone.png", "a.png", "b.png", "<image>", "</s>", "x" * 5000),
    *([{"role": "user", "content": "x"}], [{"role": "user", "content": ["x"]}], "\ud800", 10**40),
    {"role": "assistant", "content": "y"},
    {"role": "user", "content": "<image><image>"},
]


def change(value: Any, rng: Random) -> Any:
    """One change somewhere in a row."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {rng.choice(["role", "x", "image", ""]): rng.choice(VALUES)}
        return value | {key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *value[at + 1 :]]
        if rng.random() < 0.2:
            return [*value, copy.deepcopy(rng.choice([value[at], *VALUES]))]
        return [*value[:at], change(value[at], rng), *value[at + 1 :]]
    return copy.deepcopy(rng.choice(VALUES))


def is_right(record: Any, raw: Any) -> bool:
    """Return whether a row that passes has its properties, whatever was changed."""
    source, root = record.source, raw
    return (
        all(isinstance(turn["content"], str) for turn in record.prompt)
        and [turn["role"] for turn in record.prompt[::2]] == ["user"] * len(record.prompt[::2])
        and isinstance(record.chosen, str) and record.chosen.strip() != ""
        and isinstance(record.rejected, str) and record.rejected.strip() != ""
        and record.chosen.split() != record.rejected.split()
        and all("<image>" not in turn["content"] for turn in record.prompt)
        and "<image>" not in record.chosen + record.rejected
        and {source[name] for name in ("image", "retrieved_image") if name in source}
        <= {"a.png", "b.png"}
        and ("image" in root) == ("retrieved_image" in root)
    )  # fmt: skip


def test_mutated_rows_are_read_or_refused(tmp_path: Path) -> None:
    rng = Random(1)
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(name.encode())
    rows = []
    for _ in range(ROWS):
        value: Any = row(rng)
        for _ in range(rng.randrange(1, 4)):
            value = change(value, rng)
        rows.append(value)
    with_surrogates = ["\\ud800" in json.dumps(value) for value in rows]
    whole = tmp_path / "pref_data.json"
    whole.write_text(json.dumps(rows))
    assert any(with_surrogates)
    with pytest.raises(RefusedError, match="surrogates in pairs"):
        read_official_rows(whole, images)
    rows = [value for value, has in zip(rows, with_surrogates, strict=True) if not has]
    whole.write_text(json.dumps(rows))
    records, problems = read_official_rows(whole, images)
    assert len(records) + len(problems) == len(rows)
    codes = {problem.code for row in problems for problem in row}
    accepted = 0
    special = special_tokens(["</s>"])
    for record in records:
        found = list(content_problems(record, special))
        codes |= {problem.code for problem in found}
        if not found:
            assert is_right(record, rows[record.meta["source"]["index"]]), record
            accepted += 1
    assert accepted > 50
    for group in problems:
        for problem in group:
            assert problem.message.startswith(problem.place)
            assert problem.code != "refused", problem
    assert codes >= {
        *("messages", "turns", "missing-key", "image-name", "not-an-object", "image-slot"),
        *("missing", "outside-root", "url", "empty", "special-token", "equal-images"),
    }
