"""Every message that docs/guides/troubleshooting.md explains is one that the code can give."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE)
FILLED = "\0"  # where a value stands


def texts(node: ast.AST) -> Iterator[str]:
    """Every text of a file, with a mark in place of each value that is filled in.

    Texts that are added up, such as a message with an optional middle, are one.
    """
    for child in ast.walk(node):
        if isinstance(child, ast.expr) and (text := text_of(child)):
            yield text


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) if isinstance(part, ast.Constant) else FILLED for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = (text_of(node.left), text_of(node.right))
        return "".join(part or FILLED for part in parts) if any(parts) else ""
    return ""


CODE = [
    text
    for package in ("realign", "realign_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
    for text in texts(ast.parse(path.read_text(encoding="utf-8")))
]


def is_given(message: str) -> bool:
    """Return whether a text of the code has the words of a message, and values for `...`."""
    words = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(f".*{FILLED}.*".join(words), re.DOTALL)
    return any(pattern.search(text) for text in CODE)


def test_every_documented_message_is_in_the_code() -> None:
    assert len(MESSAGES) >= 25
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert not [message for message in MESSAGES if not is_given(message)]


def test_a_documented_message_missing_from_the_code_is_detected() -> None:
    assert is_given("lora.targets must name layers of the parts that train, got ...")
    assert not is_given("lora.targets must name layers of the parts that train, has ...")
    assert not is_given("lora.targets ... name layers of the parts that train, got ...")
