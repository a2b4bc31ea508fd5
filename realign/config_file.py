"""Reads a run's options: one YAML file with a section a verb, ``--set section.key=value``, then the
verb's own flags.

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from realign.config import SECTIONS, Section
from realign.errors import RefusedError
from realign.runtime.files import read_utf8

S = TypeVar("S", bound=Section)
WIDTH = 80


def load_config(
    section: type[S],
    config: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Read one section of a YAML file, apply ``--set`` overrides, then the flags that are not None.

    Raises:
        RefusedError: A file, section, key or value is refused; the message names it and the nearest
            known key.
    """
    name = next(key for key, value in SECTIONS.items() if value is section)
    raw = _read_yaml(config) if config else {}
    for override in overrides:
        _apply_override(raw, override)
    for other, content in raw.items():
        if other not in SECTIONS:
            raise RefusedError(
                f"{config or '--set'} has an unknown section {other!r}.{_nearest(other, SECTIONS)}"
            )
        _check_keys(SECTIONS[other], content or {}, other)
    values = {
        **(raw.get(name) or {}),
        **{key: value for key, value in (flags or {}).items() if value is not None},
    }
    try:
        return section(**values)
    except ValidationError as error:
        lines = [_what_is_wrong(name, problem) for problem in error.errors()]
        raise RefusedError("\n".join(lines)) from None


def _what_is_wrong(section: str, problem: Any) -> str:
    place = ".".join(map(str, (section, *problem["loc"])))
    if problem["type"] == "missing":
        return f"{place} is required. Pass --{problem['loc'][-1]} or set it in the YAML file."
    if problem["type"] == "value_error":  # of options that do not go together
        return f"{place}: {problem['ctx']['error']}."
    return f"{place}: {problem['msg']}, got {problem.get('input')!r}."


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if again := next((name for name in names if names.count(name) > 1), None):
            raise RefusedError(
                f"config must give {again!r} once, line {node.start_mark.line + 1}. Drop one."
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RefusedError(
            f"config must be a YAML file, got {path}, which does not exist. Check --config."
        )
    try:
        raw = _UniqueKeyLoader(read_utf8(path)).get_single_data()
    except yaml.YAMLError as error:
        raise RefusedError(f"{path} must be YAML ({error}). Correct it.") from None
    if not isinstance(raw, dict) or not all(
        isinstance(value, dict | None) for value in raw.values()
    ):
        raise RefusedError(
            f"{path} must map sections ({', '.join(SECTIONS)}) to options. Write them as in "
            "train: {beta: 0.1}."
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    keys = path.split(".")
    if not separator or len(keys) < 2:
        raise RefusedError(
            f"--set must be section.key=value, got {override!r}. For example train.beta=0.1."
        )
    target = raw
    for key in keys[:-1]:
        target[key] = target.get(key) or {}
        target = target[key]
        if not isinstance(target, dict):
            raise RefusedError(
                f"--set {override!r} goes below {key!r}, which holds a value. Drop what follows it."
            )
    try:
        target[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RefusedError(
            f"--set {path} must have a YAML value, got {value!r}. Quote it."
        ) from None


def _check_keys(section: type[BaseModel], content: Mapping[str, Any], where: str) -> None:
    for key, value in content.items():
        if key not in section.model_fields:
            raise RefusedError(
                f"{where} has no option {key!r}.{_nearest(str(key), section.model_fields)}"
            )
        inner = inner_section(section.model_fields[key].annotation)
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{where}.{key}")


def inner_section(annotation: Any) -> type[BaseModel] | None:
    """The section that an option holds, if it holds one."""
    parts = typing.get_args(annotation) or (annotation,)
    sections = (part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
    return next(sections, None)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


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
