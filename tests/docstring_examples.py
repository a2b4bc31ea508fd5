"""Runs the example in the docstring of a public name."""

from __future__ import annotations

import doctest
import inspect


def name_of(public: object) -> str:
    return f"{inspect.getmodule(public).__name__}.{public.__qualname__}"


def check_example(public: object) -> None:
    """Fail unless there is an example and it gives what it shows. It sees no names but its own."""
    parsed = doctest.DocTestParser().get_doctest(
        inspect.getdoc(public), {}, name_of(public), None, None
    )
    assert parsed.examples, f"{name_of(public)} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    runner.run(parsed, out=report.append)
    assert runner.failures == 0, "".join(report)
