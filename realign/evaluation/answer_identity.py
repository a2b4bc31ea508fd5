"""Identity of stored answers: the model, its processor and chat template, the decoding, the data
and the machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from realign.evaluation.answer_scores import data_version
from realign.evaluation.benchmark import Task
from realign.modeling.folder import is_adapter, model_identity, resolve_base
from realign.modeling.model_config import load_model_config
from realign.modeling.processors import load_processor
from realign.runtime.files import content_sha256, json_text
from realign.runtime.strict_json import read_json

BASE = "base/"  # before the names of the files that an adapter stands on


class AskedModel:
    """Facts of a model that are known without its weights, each found once.

    Args:
        folder: From :func:`realign.modeling.folder.resolve_model`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file that answers depend on."""
        return model_identity(self.folder, generates=True)

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        return load_processor(self.folder)

    @cached_property
    def config(self) -> Any:
        """The configuration of the model, or of an adapter's base."""
        return load_model_config(self.folder)

    def processor_identity(self) -> dict[str, str]:
        """Return the classes of the processor, which depend on the installed packages, and the
        SHA-256 of its chat template.
        """
        processor = self.processor
        template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
        text = template if isinstance(template, str) else json_text(template, sort_keys=True)
        return {
            "class": type(processor).__name__,
            "image_processor": type(getattr(processor, "image_processor", None)).__name__,
            "tokenizer": type(processor.tokenizer).__name__,
            "chat_template_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    def header(self) -> dict[str, Any]:
        """Return the model, the adapter on it, if any, and the processor, for a header."""
        own = {name: sha for name, sha in self.files.items() if not name.startswith(BASE)}
        base = {
            name.removeprefix(BASE): sha
            for name, sha in self.files.items()
            if name.startswith(BASE)
        }
        has_adapter = is_adapter(self.folder)
        return {
            "model": {"files": base if has_adapter else own},
            "adapter": {"files": own} if has_adapter else None,
            "processor": self.processor_identity(),
            "generation_config": self._generation_config(),
        }

    def _generation_config(self) -> Any:
        """Return the model's own settings of generation. Its sampling and beams are not used."""
        folder = resolve_base(self.folder) if is_adapter(self.folder) else self.folder
        path = folder / "generation_config.json"
        return read_json(path) if path.is_file() else None


def data_identity(tasks: Mapping[str, Task]) -> dict[str, dict[str, str]]:
    """Return the version and a hash of the rows of every benchmark, by its name."""
    benchmarks = {task.benchmark.name: task.benchmark for task in tasks.values()}
    found = {}
    for name, benchmark in benchmarks.items():
        rows = {key: task.rows for key, task in tasks.items() if task.benchmark is benchmark}
        lines = [
            json_text({**row, "where": ""}, sort_keys=True, default=sorted)
            for key in rows
            for row in rows[key]
        ]
        found[name] = {"version": data_version(benchmark, rows), "sha256": content_sha256(*lines)}
    return found
