"""Options of a command, read from a YAML file with one section per command, from
``--set section.key=value``, and from the command's own flags. Later ones override earlier ones.

Flags and help are generated from the sections. An unknown key is an error that names the nearest
known one.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from realign.config import SECTIONS, Section, Shown
from realign.errors import RefusedError
from realign.runtime.strict_yaml import parse_yaml, read_yaml

S = TypeVar("S", bound=Section)


def load_config(
    section: type[S],
    config: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Read one section of a YAML file, apply ``--set`` overrides, then flags.

    Args:
        section: Class of the section.
        config: YAML file; it may hold sections of other commands too.
        overrides: Texts ``section.key=value``.
        flags: Values by field, such as :func:`flag_values` returns.
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
                f"{config or '--set'} has an unknown section {other!r}."
                f"{_nearest(str(other), SECTIONS)}"
            )
        _check_keys(SECTIONS[other], content or {}, other)
    try:
        return section(**(raw.get(name) or {}) | dict(flags or {}))
    except ValidationError as error:
        lines = [_message(section, name, problem) for problem in error.errors()]
        raise RefusedError("\n".join(lines)) from None


def _message(section: type[Section], name: str, problem: Any) -> str:
    place = ".".join(map(str, (name, *problem["loc"])))
    if problem["type"] == "missing":
        key, *inner = problem["loc"]
        flag = f"--set {place}" if inner else flag_name(key, section.model_fields[key])
        return f"{place} is required. Pass {flag} or set it in the YAML file."
    if problem["type"] == "value_error":  # options that exclude or require each other
        return f"{place}: {problem['ctx']['error']}."
    return f"{place}: {problem['msg']}, got {problem.get('input')!r}."


def _read_yaml(path: Path) -> dict[str, Any]:
    raw = read_yaml(path, "config")
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
                f"--set must not go below {key!r}, which holds a value, got {override!r}. Drop "
                f"what follows {key!r}."
            )
    try:
        target[keys[-1]] = parse_yaml(value, f"--set {path}")
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
        inner = inner_section(section.model_fields[key])
        if inner and isinstance(value, dict):
            _check_keys(inner, value, f"{where}.{key}")


def options(section: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield heading, key and field of each option. A heading holds until the next one."""
    group = ""
    for key, field in section.model_fields.items():
        group = _shown(field, "group") or group
        yield group, key, field


def flag_name(key: str, field: FieldInfo) -> str:
    """Return the flag of an option, such as ``--learning-rate``."""
    return f"--{_shown(field, 'flag') or key}".replace("_", "-")


def metavar(field: FieldInfo) -> str:
    """Return the placeholder of an option's value, such as ``<float>``."""
    names = [
        f"<{kind.__name__.lower()}>" if isinstance(kind, type) else str(kind)
        for kind in kinds(field.annotation)
        if kind is not NoneType
    ]
    return _shown(field, "metavar") or "|".join(names)


def meaning(field: FieldInfo) -> str:
    """Return the help of an option: its docstring and its default."""
    text = " ".join((field.description or "").replace("``", "").split())
    if field.is_required():
        return f"{text} Required, here or in --config."
    default = field.get_default(call_default_factory=True)
    if default in (None, [], {}) or isinstance(default, BaseModel):
        return text
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text}  [default: {shown.lower() if isinstance(default, bool) else shown}]"


def flag_values(section: type[Section], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the given flags by key; pydantic converts numbers and paths.

    Args:
        section: Class of the section.
        given: By key: the text of a flag, the texts of a repeated flag, or the state of a switch.
            A flag that was not given is None, an empty list, or absent.
    Raises:
        RefusedError: A text that must be ``NAME=VALUE`` is not, or repeats a name.
    """
    values = {}
    for _, key, field in options(section):
        value, allowed = given.get(key), [*kinds(field.annotation)]
        if value in (None, (), []):
            continue
        words = {str(kind): kind for kind in allowed if not isinstance(kind, type)}
        if NoneType in allowed:
            words["null"] = None
        if dict in allowed:
            value = read_pairs(value, flag_name(key, field), metavar(field))
        values[key] = words.get(value, value) if isinstance(value, str) else value
    return values


def read_pairs(texts: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """Split the texts of a repeated flag into names and values.

    Args:
        texts: Texts such as ``NAME=FOLDER``.
        flag: Name of the flag, for messages.
        form: Form that a text must have, for messages.
    Raises:
        RefusedError: A text has another form, or repeats a name.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise RefusedError(f"{flag} must be {form}, got {text!r}. Put a name before it.")
        if name in pairs:
            raise RefusedError(f"{flag} must have different names, got {name!r} twice. Rename it.")
        pairs[name] = value
    return pairs


def nested_help(command: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the heading and the rows of the help for each kind of nested section of a command."""
    places: dict[type[BaseModel], list[tuple[str, str]]] = {}
    for _, key, field in options(SECTIONS[command]):
        if section := inner_section(field):
            places.setdefault(section, []).append((f"{command}.{key}", meaning(field)))
    for section, rows in places.items():
        keys = [
            (f"  .{key} {metavar(field)}", meaning(field)) for _, key, field in options(section)
        ]
        yield f"Nested options, with --set {rows[0][0]}.KEY=VALUE or in --config", rows + keys


def inner_section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that an option holds, if it holds one."""
    types = (kind for kind in kinds(field.annotation) if isinstance(kind, type))
    return next((kind for kind in types if issubclass(kind, BaseModel)), None)


def kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types and the literal values that an annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from kinds(arguments[0])
    elif origin in (UnionType, typing.Union):
        for argument in arguments:
            yield from kinds(argument)
    elif origin is typing.Literal:
        yield from arguments
    else:
        yield origin or annotation


def _shown(field: FieldInfo, name: str) -> str:
    marks = (getattr(mark, name) for mark in field.metadata if isinstance(mark, Shown))
    return next(filter(None, marks), "")


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."
