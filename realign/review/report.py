"""``realign report``: write one static HTML page about a run or a dataset."""

from __future__ import annotations

from pathlib import Path

from realign.errors import RefusedError
from realign.review.dataset_page import dataset_page
from realign.review.run_page import Lead, holds_run, run_page
from realign.runtime.run_folder import check_out


def write_report(
    path: Path, out: Path | None = None, images: Path | None = None, lead: Lead | None = None
) -> Path:
    """Write the page and return its path.

    Args:
        path: Folder of a run with any of ``dataset/``, ``metrics.jsonl``, ``eval/``; or a dataset:
            a build folder, parquet file or JSON file.
        out: File to write; by default ``report.html`` in the folder, or ``<name>.html`` beside a
            file.
        images: Folder of the images that a JSON file names.
        lead: First part of the page of a run.
    Raises:
        RefusedError: There is nothing to report on, or the page cannot be written there.
    """
    out = out or default_page(path)
    check_out(out.parent)
    if out.is_dir():
        raise RefusedError(
            f"out must be a file for the page, got the folder {out}. Add a name: {out}/report.html."
        )
    if path.is_file() or ((path / "dataset.parquet").is_file() and not holds_run(path)):
        return dataset_page(path, out, images)
    return run_page(path, out, lead)


def default_page(path: Path) -> Path:
    """Return the path of the page if ``out`` is not given."""
    if path.is_file() and path.name != "dataset.parquet":
        return path.with_name(f"{path.name}.html")
    return (path.parent if path.is_file() else path) / "report.html"
