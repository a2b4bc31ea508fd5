"""Reading of YAML that people write. A repeated key is refused, of which PyYAML would silently keep
the last value, and so are numbers that YAML 1.1 reads in another base: 010 is 8, 12:30 is 750.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from realign.errors import RefusedError
from realign.runtime.files import read_utf8


def read_yaml(path: Path, name: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file.
        name: What the file is, for messages: ``config``.
    Raises:
        RefusedError: There is no such file, it is not YAML, or :func:`parse_yaml` refuses it.
    """
    if not path.is_file():
        raise RefusedError(
            f"{name} must be a YAML file, got {path}, which does not exist. Check the path."
        )
    text = read_utf8(path)
    try:
        return parse_yaml(text, name)
    except yaml.YAMLError as error:
        raise RefusedError(f"{name} {path} must be YAML ({error}). Correct it.") from None


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: The text.
        name: What the text is, for messages: ``config``.
    Raises:
        RefusedError: A mapping has a key twice, or a number is octal or sexagesimal.
        yaml.YAMLError: The text is not YAML.
    """
    loader = _StrictLoader(text)  # refuses control characters
    loader.text_name = name
    return loader.get_single_data()


class _StrictLoader(yaml.SafeLoader):
    text_name = ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if again := next((name for name in names if names.count(name) > 1), None):
            raise RefusedError(
                f"{self.text_name} must have every key once, got {again!r} twice in the section "
                f"that begins in line {node.start_mark.line + 1}. Drop one."
            )
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        is_float = node.tag.endswith("float")
        construct = self.construct_yaml_float if is_float else self.construct_yaml_int
        number: int | float = construct(node)
        if ":" in node.value or (not is_float and re.match(r"[-+]?0[0-9_]", node.value)):
            raise RefusedError(
                f"{self.text_name} must have decimal numbers, got {node.value} in line "
                f"{node.start_mark.line + 1}, which YAML reads as {number}. Write the number that "
                "you mean, or put a text in quotes."
            )
        return number


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_number)
# as in JSON; PyYAML reads 1e-5, which has no point, as a text
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
