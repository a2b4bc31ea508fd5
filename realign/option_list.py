"""The options of a verb's section as text, for ``realign VERB --help``."""

from __future__ import annotations

import textwrap
import typing
from types import NoneType, UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from realign.config import SECTIONS
from realign.config_file import inner_section

WIDTH = 80


def option_list(verb: str) -> str:
    """Every key that ``--set`` and the YAML file take, with type, default and meaning."""
    lines = [f"Options of --set and of section {verb!r} in the YAML file:"]
    for key, field in SECTIONS[verb].model_fields.items():
        lines += _entry(f"{verb}.{key}", field)
        if section := inner_section(field.annotation):
            for inner, inner_field in section.model_fields.items():
                lines += _entry(f"{verb}.{key}.{inner}", inner_field)
    return "\n".join(lines) + "\n"


def _entry(name: str, field: FieldInfo) -> list[str]:
    default = "required" if field.is_required() else f"default {_value(field)}"
    meaning = " ".join((field.description or "").replace("``", "").split())
    indented = textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {name}: {_type(field.annotation)}, {default}", *indented]


def _value(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    # as YAML spells them
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (UnionType, typing.Union):
        return " or ".join(_type(part) for part in arguments if part is not NoneType)
    if origin is not None:
        return f"{origin.__name__} of {' to '.join(map(_type, arguments))}"
    if issubclass(annotation, BaseModel):
        return "section"
    return str(annotation.__name__).lower()
