"""Every refusal in the source ends with a remedy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import realign

PACKAGE = Path(realign.__file__).parent
REFUSALS = ("RefusedError", "RefusedRowError")  # the text is the last argument of both


def refusals() -> Iterator[tuple[str, str]]:
    """File and text of each refusal, of a row or of all, names in place of values, and of each
    reason of a ``RefusedImage``.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in REFUSALS:
                yield str(path.relative_to(PACKAGE)), template(node.args[-1])
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                yield str(path.relative_to(PACKAGE)), template(node.value)


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{value}" for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "{lines}"


@pytest.mark.parametrize(("file", "text"), list(refusals()))
def test_every_refusal_states_a_remedy(file: str, text: str) -> None:
    """A list of problems has a remedy per line, and a single message has one more sentence."""
    remedy = r"[.;]({value}|\s+\S.*[.}])$"
    assert text.startswith("{lines}") or "\n" in text or re.search(remedy, text), (file, text)
