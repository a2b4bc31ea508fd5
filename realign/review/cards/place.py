"""Tell whether a path is a model, with or without its run, or a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from realign.errors import RefusedError

CARD = "README.md"
PARQUET = "dataset.parquet"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class ModelPlace:
    """A folder of a model or an adapter.

    Attributes:
        folder: Folder of the weights.
        run: Folder of the run that trained the model, if known.
    """

    folder: Path
    run: Path | None


@dataclass(frozen=True)
class DatasetPlace:
    """A folder with ``dataset.parquet``, such as ``realign build`` makes it."""

    folder: Path


Place = ModelPlace | DatasetPlace


def find_place(path: Path, run: Path | None = None) -> Place:
    """Return the model or dataset of a path.

    Args:
        path: A run, its checkpoint, another folder of a model, or a folder with dataset.parquet.
        run: Run that trained the model, if it is not the folder above the model.
    Raises:
        RefusedError: The path is none of these, or is a run and a dataset at once.
    """
    if not path.exists():
        raise RefusedError(
            f"path must be a run, a model or a dataset, got {path}, which does not exist. Check it."
        )
    if run is not None and not (run / "train.json").is_file():
        raise RefusedError(
            f"run must be a folder of `realign train`, got {run}, which has no train.json. Check "
            "--run."
        )
    folder = path.resolve()
    if folder.name == PARQUET and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise RefusedError(
            f"path must be a folder, got the file {path}. Give the folder that holds {PARQUET}; "
            "other files become one by `realign build` or `realign.write_parquet`."
        )
    has_rows = (folder / PARQUET).is_file()
    if is_model(folder) and not has_rows:
        return ModelPlace(folder, run or _run_of(folder))
    has_checkpoint = is_model(folder / CHECKPOINT)
    if has_rows and has_checkpoint and path.name != PARQUET:
        raise RefusedError(
            f"path must be one thing, got {path}, which holds a run's {CHECKPOINT}/ and "
            f"{PARQUET}. Give {path / CHECKPOINT} or {path / PARQUET}."
        )
    if has_rows:
        if run is not None:
            raise RefusedError(f"run must not be set for a dataset, got {run}. Drop --run.")
        return DatasetPlace(folder)
    if has_checkpoint:
        return ModelPlace(folder / CHECKPOINT, run or folder)
    if (folder / "train.json").is_file():
        raise RefusedError(
            f"path must be a run with a {CHECKPOINT}/, got {path}, which has none yet. Give the "
            "same `realign train` again until it ends."
        )
    raise RefusedError(
        f"path must be a run, a model or a dataset, got {path}, which holds neither "
        f"{CHECKPOINT}/, nor config.json, nor adapter_config.json, nor {PARQUET}. Check it."
    )


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _run_of(folder: Path) -> Path | None:
    run = folder.parent
    return run if folder.name == CHECKPOINT and (run / "train.json").is_file() else None
