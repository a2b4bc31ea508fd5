"""Write a folder from which lmms-eval asks models the questions of published files, offline.

<out>/run.sh            the command; it passes its options to lmms-eval, such as --limit 8
<out>/tasks/*.yaml      the installed task files, with the data below instead of the hub's
<out>/data/TASK/        the questions with their images, as `datasets` stores them
<out>/models/NAME/      a model for each adapter, merged into its base
<out>/suite.json        models, data and commands
<out>/results/NAME/     output of lmms-eval
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from realign.data.image_names import check_image_root, resolve_image
from realign.data.images import image_size
from realign.errors import RefusedError
from realign.evaluation.benchmark import MissingData
from realign.evaluation.registry import find_benchmark
from realign.evaluation.rows import Row
from realign.evaluation.suites.lmms_tasks import PREFIX, TASKS, LmmsTask
from realign.evaluation.suites.suite_models import SuiteModel, find_models, merge_models
from realign.runtime.files import file_sha256, json_text, new_folder, write_json, write_text

NAME = "lmms-eval"
MANIFEST = "suite.json"
INSTALL = (
    "Install it into an environment of its own: pip install lmms-eval==0.7.3 decord, pip uninstall "
    "torchvision where torch is a CPU build"
)
# model type to backend of lmms-eval; no backend loads an adapter
BACKENDS = {
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}
# backends that fail on a question without an image, and store an empty answer
NEEDS_IMAGES = ("llava_hf",)
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_UNQUOTABLE = set(",\"'{}[]")  # characters at which lmms-eval cuts a value of --model_args
_FIND = (
    "import importlib.metadata, importlib.util, json; "
    "found = importlib.util.find_spec('lmms_eval'); "
    "print(json.dumps(found and [found.submodule_search_locations[0], "
    "importlib.metadata.version('lmms_eval')]))"
)


class Installed(NamedTuple):
    """An installed lmms-eval."""

    python: str
    folder: Path
    version: str


def write_lmms_eval(
    models: Mapping[str, str],
    data: Path,
    images: Path,
    out: Path,
    *,
    python: str = sys.executable,
    device: str = "cuda",
    backend: str | None = None,
) -> dict[str, Any]:
    """Write a folder from which lmms-eval runs without network.

    Args:
        models: Name to folder or hub id; an adapter is merged into its base.
        data: Folder with the published files of one or more benchmarks.
        images: Folder of the questions' images.
        out: Folder to create.
        python: Interpreter of the environment in which lmms-eval is installed.
        device: ``cuda``, which spreads a model over all GPUs, or ``cpu``.
        backend: Model class of lmms-eval; by default that of the model's type.
    Returns:
        The content of ``suite.json``; ``commands`` maps each model to its command.
    Raises:
        RefusedError: lmms-eval is not installed for ``python``, ``data`` has no benchmark of
            lmms-eval, an image is missing, or a model has no backend.
    """
    if out.exists():
        raise RefusedError(f"out must be a new folder, got {out}, which exists. Name another.")
    check_image_root(images)
    installed = find_lmms_eval(python)
    place = out.absolute()
    chosen = find_models(models, place)
    backends = {name: backend or _backend(model) for name, model in chosen.items()}
    questions = _questions(data, needs_images=bool({*backends.values()} & {*NEEDS_IMAGES}))
    commands = {
        name: _command(installed, model, questions, place, device, backends[name])
        for name, model in chosen.items()
    }
    for _, rows, _ in questions:
        for row in rows:
            if row["image"] is not None:
                image_size(resolve_image(images, row["image"], row["where"]))
    with new_folder(place) as folder:
        merge_models(chosen.values(), folder)
        for task, rows, _ in questions:
            _write_task(task, rows, images, folder, place, installed)
        manifest = {
            "suite": NAME,
            "version": installed.version,
            "data": str(data.absolute()),
            "models": {name: model._asdict() for name, model in chosen.items()},
            "tasks": {
                PREFIX + task.name: {"items": len(rows), "files": files}
                for task, rows, files in questions
            },
            "commands": commands,
        }
        write_json(folder / MANIFEST, manifest)
        write_text(folder / "run.sh", _script(commands, installed))
    return manifest


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """Return lines with the tasks to ask, and the command of every model."""
    asked = (f"{name}: {task['items']:,} questions" for name, task in manifest["tasks"].items())
    return [*asked, *map(shlex.join, manifest["commands"].values())]


def find_lmms_eval(python: str) -> Installed:
    """Return the lmms-eval of an environment.

    Raises:
        RefusedError: The interpreter does not run, or does not find lmms-eval.
    """
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
            f"lmms-eval must be installed for {python}, got none there. {INSTALL}; then pass its "
            "interpreter as --python."
        )
    return Installed(python, Path(found[0]), found[1])


Questions = list[tuple[LmmsTask, list[Row], dict[str, str]]]  # task, rows, file name to SHA-256


def _questions(data: Path, *, needs_images: bool) -> Questions:
    """Return the tasks whose data a folder holds, with their rows and files.

    Args:
        data: Folder of published files.
        needs_images: Whether to replace a task that has questions without an image by its part
            with images.
    """
    found: Questions = []
    left_out: set[str] = set()
    read: dict[str, Any] = {}
    for task in TASKS:
        if task.part_of and task.part_of not in left_out:
            continue
        benchmark = find_benchmark(task.benchmark)
        if task.benchmark not in read:
            read[task.benchmark] = {}
            with suppress(MissingData):
                read[task.benchmark] = benchmark.read_tasks(data)
        tasks = read[task.benchmark]
        rows = task.rows({name: asked.rows for name, asked in tasks.items()})
        files = {
            file: file_sha256(data / file)
            for name, asked in tasks.items()
            if not task.tasks or name in task.tasks
            for file in asked.files
            if (data / file).is_file()
        }
        if needs_images and any(row["image"] is None for row in rows):
            left_out.add(task.name)
        elif rows:
            found.append((task, rows, files))
    if not found:
        known = ", ".join(dict.fromkeys(task.benchmark for task in TASKS))
        raise RefusedError(
            f"data must hold the files of a benchmark that lmms-eval has too ({known}), got "
            f"{data}, which has none of them. Check --data."
        )
    return found


def _command(
    installed: Installed,
    model: SuiteModel,
    questions: Questions,
    place: Path,
    device: str,
    backend: str,
) -> list[str]:
    if _UNQUOTABLE & set(model.folder):
        raise RefusedError(
            f"the folder of model {model.name} must have no comma, quotation mark or bracket in "
            f"its path, since lmms-eval cuts it there, got {model.folder}. Rename it."
        )
    on_cpu = ["--device", "cpu"] if device == "cpu" else []
    return [
        *(installed.python, "-m", "lmms_eval", "eval", "--model", backend),
        *("--model_args", f"pretrained={model.folder},device_map={_device_map(device)}", *on_cpu),
        *("--tasks", ",".join(PREFIX + task.name for task, _, _ in questions)),
        *("--include_path", str(place / "tasks"), "--batch_size", "1"),
        *("--output_path", str(place / "results" / model.name), "--log_samples"),
        *("--timezone", "UTC"),  # the default is the time of Singapore
    ]


def _backend(model: SuiteModel) -> str:
    if model.type not in BACKENDS:
        raise RefusedError(
            f"model {model.name} must be of a type that lmms-eval has a class for "
            f"({', '.join(BACKENDS)}), got {model.type}. Name a class of `lmms-eval models` with "
            "--backend, or serve the model and evaluate the server."
        )
    return BACKENDS[model.type]


def _device_map(device: str) -> str:
    if device not in ("cuda", "cpu"):
        raise RefusedError(f"device must be cuda or cpu, got {device!r}. Name one of them.")
    return "cpu" if device == "cpu" else "auto"


def _script(commands: Mapping[str, Sequence[str]], installed: Installed) -> str:
    lines = [
        "#!/bin/sh",
        f"# lmms-eval {installed.version} on the questions beside this file. Options are passed",
        "# on: --limit 8 asks only a few questions, for a trial.",
        "set -eu",
        f"export {' '.join(f'{name}=1' for name in OFFLINE)}",
    ]
    lines += [f'{shlex.join(command)} "$@"' for command in commands.values()]
    return "\n".join(lines) + "\n"


def _write_task(
    task: LmmsTask,
    rows: Sequence[Row],
    images: Path,
    folder: Path,
    place: Path,
    installed: Installed,
) -> None:
    original = installed.folder / "tasks" / task.file
    if not original.is_file():
        raise RefusedError(
            f"lmms-eval must have the task file {task.file}, got lmms-eval {installed.version}, "
            "which has none. Install lmms-eval 0.7.3."
        )
    settings = {
        "include": str(original),
        "task": PREFIX + task.name,
        "dataset_path": str(place / "data" / task.name),
        "dataset_kwargs": {"load_from_disk": True},
        **task.settings,
    }
    # JSON is valid YAML, and quotes every path correctly
    lines = [f"{key}: {json_text(value)}" for key, value in settings.items()]
    write_text(folder / "tasks" / f"{PREFIX}{task.name}.yaml", "\n".join(lines) + "\n")
    _write_dataset(task, rows, images, folder / "data" / task.name)


def _write_dataset(task: LmmsTask, rows: Sequence[Row], images: Path, folder: Path) -> None:
    from datasets import Dataset, DatasetDict, Image

    documents = [task.document(row) for row in rows]
    columns: dict[str, list[Any]] = {
        name: [document[name] for document in documents] for name in documents[0]
    }
    columns["image"] = [
        None if row["image"] is None else str(resolve_image(images, row["image"], row["where"]))
        for row in rows
    ]
    # images are read when the dataset is saved
    dataset = Dataset.from_dict(columns).cast_column("image", Image())
    DatasetDict({task.split: dataset}).save_to_disk(folder)
