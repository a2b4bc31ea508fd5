"""Triton's interpreter without its repeated work."""

from __future__ import annotations

import functools
from typing import Any

import pytest


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter look up once what it looks up in every call, which halves its time.

    In every launch and every call of a device function it searches the language of Triton for the
    functions to replace, and in every operation it makes the table of NumPy's types.
    """
    from triton import language
    from triton.runtime import interpreter

    search = interpreter._patch_lang
    found: dict[Any, list[tuple[Any, str, Any]]] = {}
    running: list[Any] = []  # the scope of the launch, if one runs

    class Scope(interpreter._LangPatchScope):
        """The parts of the language that a launch replaces, and restores at its end."""

        def __init__(self) -> None:
            super().__init__()
            self.modules: frozenset[str] = frozenset()

        def restore(self) -> None:
            running.clear()
            super().restore()

    def replace(function: Any) -> Any:
        if not running:
            running.append(Scope())
        (scope,) = running
        seen = function.__globals__.values()
        modules = scope.modules.union(
            module.__name__
            for module in (language, language.core)
            if any(value is module for value in seen)
        )
        if modules == scope.modules:
            return scope
        step = scope.modules, modules
        if step in found:
            for place, name, value in found[step]:
                scope.set_attr(place, name, value)
        else:
            changes = search(function)._changes
            found[step] = [(place, name, getattr(place, name)) for place, name, _ in changes]
            scope._changes += changes
        scope.modules = modules
        return scope

    numpy_type = interpreter._get_np_dtype
    numpy_type_of_element = functools.cache(numpy_type)

    def quick_numpy_type(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        is_pointer = isinstance(element, language.pointer_type)
        return numpy_type(element) if is_pointer else numpy_type_of_element(element)

    monkeypatch.setattr(interpreter, "_patch_lang", replace)
    monkeypatch.setattr(interpreter, "_get_np_dtype", quick_numpy_type)
