"""Reading of YAML files that people write. A repeated key is refused; PyYAML would silently keep
the last value.
"""

from __future__ import annotations

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
        RefusedError: There is no such file, it is not YAML, or a mapping has a key twice.
    """
    if not path.is_file():
        raise RefusedError(
            f"{name} must be a YAML file, got {path}, which does not exist. Check the path."
        )
    text = read_utf8(path)
    try:
        loader = _UniqueKeyLoader(text)  # refuses control characters
        loader.file_name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RefusedError(f"{name} {path} must be YAML ({error}). Correct it.") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    file_name = ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if again := next((name for name in names if names.count(name) > 1), None):
            raise RefusedError(
                f"{self.file_name} must have every key once, got {again!r} twice in the section "
                f"that begins in line {node.start_mark.line + 1}. Drop one."
            )
        return super().construct_mapping(node, deep)
