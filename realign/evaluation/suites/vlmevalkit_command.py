"""The command with which VLMEvalKit evaluates models on its own tables.

<out>/run.sh            the command; further options go to VLMEvalKit, such as --mode infer
<out>/vlmeval.json      its models and data sets
<out>/models/NAME/      an adapter, merged into its base
<out>/suite.json        what all of it was made from
<out>/results/          what VLMEvalKit writes
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.evaluation.suites.suite_models import SuiteModel, find_models, merge_models
from realign.runtime.files import new_folder, write_json, write_text

NAME = "vlmevalkit"
MANIFEST = "suite.json"
SERVE = (
    "Serve it, such as with vLLM, and give VLMEvalKit the server: python run.py --model {name} "
    "--data POPE --base-url http://127.0.0.1:8000/v1 --judge exact_matching"
)


class Table(NamedTuple):
    """A table of VLMEvalKit, which it downloads over any file of its name with another digest."""

    kind: str
    md5: str


TABLES = {
    "POPE": Table("ImageYORNDataset", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
    "HallusionBench": Table("ImageYORNDataset", "0c23ac0dc9ef46832d7a24504f2a0c7c"),
    "MME": Table("ImageYORNDataset", "b36b43c3f09801f5d368627fb92187c3"),
    "AMBER": Table("ImageYORNDataset", "970d94c0410916166e0a76ba75da7934"),
    "MMBench_DEV_EN": Table("ImageMCQDataset", "b6caf1133a01c6bb705cf753bb527ed8"),
    "ScienceQA_TEST": Table("ImageMCQDataset", "e42e9e00f9c59a80d8a5db35bc32b71f"),
    "TextVQA_VAL": Table("ImageVQADataset", "b233b31f551bbf4056f2f955da3a92cd"),
}
# Words in the path of a LLaVA-NeXT model, by which its class chooses the prompt, in its order, and
# the type of language model that each is for.
PATH_WORDS = {"mistral": "mistral", "vicuna": "llama", "34b": "llama"}
_FIND = (
    "import importlib.util, json; found = importlib.util.find_spec('vlmeval'); "
    "print(json.dumps(found and found.submodule_search_locations[0]))"
)


def write_vlmevalkit(
    models: Mapping[str, str],
    data: Path,
    out: Path,
    *,
    python: str,
    device: str = "cuda",
    backend: str | None = None,
) -> list[str]:
    """Write a folder from which VLMEvalKit runs.

    Args:
        models: Folders or hub ids by name; an adapter is merged into its base.
        data: Folder with VLMEvalKit's own tables, such as ``POPE.tsv``.
        out: A new folder.
        python: Interpreter of the environment that has VLMEvalKit, or its fork ms-vlmeval.
        device: ``cuda``; its model classes have no other.
        backend: Model class of VLMEvalKit; by default that of the model's type.
    Returns:
        Lines to print.
    Raises:
        RefusedError: It is not installed there, a table is missing or would be downloaded again, or
            it cannot load a model.
    """
    if out.exists():
        raise RefusedError(f"out must be a new folder, got {out}, which exists. Name another.")
    if device != "cuda":
        raise RefusedError(
            f"device must be cuda for VLMEvalKit, whose model classes know no other, got {device}. "
            "Use lmms-eval on a CPU."
        )
    command = _program(python)
    tables = find_tables(data)
    place = out.absolute()
    chosen = find_models(models, place)
    config = {
        "model": {name: _model_entry(model, backend) for name, model in chosen.items()},
        "data": {name: {"class": TABLES[name].kind, "dataset": name} for name in tables},
    }
    with new_folder(place) as folder:
        merge_models(chosen.values(), folder)
        command += [
            *("--config", str(place / "vlmeval.json"), "--work-dir", str(place / "results")),
            *("--judge", "exact_matching", "--verbose"),
        ]
        write_json(folder / "vlmeval.json", config)
        write_json(
            folder / MANIFEST,
            {
                "suite": NAME,
                "data": str(data.absolute()),
                "models": {name: model._asdict() for name, model in chosen.items()},
                "tables": tables,
                "command": command,
            },
        )
        line = f"LMUData={shlex.quote(str(data.absolute()))} PRED_FORMAT=json {shlex.join(command)}"
        about = "# VLMEvalKit on its own tables; a judge is not asked, answers are matched exactly."
        write_text(folder / "run.sh", f'#!/bin/sh\n{about}\nset -eu\n{line} "$@"\n')
    return [line]


def _program(python: str) -> list[str]:
    """Return the command that starts VLMEvalKit: a checkout has run.py, its fork does not."""
    try:
        done = subprocess.run(
            [python, "-c", _FIND], capture_output=True, text=True, check=True, timeout=120
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise RefusedError(
            f"python must be an interpreter that runs, got {python} ({error!s:.120}). Check "
            "--python."
        ) from None
    if found is None:
        raise RefusedError(
            f"VLMEvalKit must be installed for {python}, got none there. Clone "
            "open-compass/VLMEvalKit into an environment of its own and pip install -e it, or "
            "install ms-vlmeval; then pass its interpreter as --python."
        )
    checkout = Path(found).parent / "run.py"
    return [python, str(checkout)] if checkout.is_file() else [python, "-m", "vlmeval.run"]


def find_tables(data: Path) -> list[str]:
    """Return the names of the tables that a folder holds.

    Raises:
        RefusedError: It holds none, or another file of that name, which VLMEvalKit would replace.
    """
    found = [name for name in TABLES if (data / f"{name}.tsv").is_file()]
    if not found:
        wanted = ", ".join(f"{name}.tsv" for name in TABLES)
        raise RefusedError(
            f"data must hold a table of VLMEvalKit ({wanted}), got {data}, which has none. "
            "Download one from the address in its vlmeval/dataset."
        )
    for name in found:
        path = data / f"{name}.tsv"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        if digest != TABLES[name].md5:
            raise RefusedError(
                f"{path} must be VLMEvalKit's own table (MD5 {TABLES[name].md5}), got {digest}. It "
                "would be downloaded again over this file; move the file away."
            )
    return found


def _model_entry(model: SuiteModel, backend: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"model_path": model.folder}
    if backend is not None:
        return {"class": backend, **entry}
    if model.type in ("qwen2_vl", "qwen2_5_vl"):
        # by default it samples, at temperature 0.01
        return {"class": "Qwen2VLChat", **entry, "do_sample": False}
    if model.type == "qwen3_vl":
        return {"class": "Qwen3VLChat", **entry, "do_sample": False}
    if model.type == "llava_next":
        _check_path_words(model)
        return {"class": "LLaVA_Next", **entry}
    reason = (
        "LLaVA_Next loads no checkpoint of LLaVA-1.5, and its class LLaVA needs LLaVA's own package"
        if model.type == "llava"
        else "it has no class for it that takes a folder of transformers"
    )
    raise RefusedError(
        f"model {model.name} must be one that VLMEvalKit loads (llava_next, qwen2_vl, qwen2_5_vl, "
        f"qwen3_vl), got {model.type}: {reason}. {SERVE.format(name=model.name)}."
    )


def _check_path_words(model: SuiteModel) -> None:
    """Refuse a LLaVA-NeXT model that would be asked without a prompt or with that of another."""
    path = model.folder.lower()
    word = next((word for word in PATH_WORDS if word in path), None)
    if word is None or PATH_WORDS[word] != model.language_type:
        fitting = " or ".join(
            word for word, kind in PATH_WORDS.items() if kind == model.language_type
        )
        raise RefusedError(
            f"the path of model {model.name} must hold {fitting or 'mistral, vicuna or 34b'}, from "
            f"which VLMEvalKit takes the prompt of LLaVA-NeXT, got {word or 'none'} in "
            f"{model.folder}. Name the {'model' if model.is_merged else 'folder'} so."
        )
