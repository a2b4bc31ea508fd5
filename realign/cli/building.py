"""The commands that make and show datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import Images, check_exists, check_out
from realign.cli.sections import SectionCommand, read_options

if TYPE_CHECKING:
    from realign.config import BuildConfig, CheckConfig


@app.command(cls=SectionCommand)
def build(
    ctx: typer.Context,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check sources, servers and keys, show how much would be asked of whom, and stop.",
        ),
    ] = False,
) -> None:
    """Build preference pairs from images and good answers.

    Answers are masked, similar images retrieved, and the model refills the mask while it looks at
    one of them. The refilled text becomes the rejected answer. A stopped build continues when the
    same command is given again.
    """
    from realign.data.build_folder import read_funnel
    from realign.data.formats.layouts import recognise
    from realign.data.image_names import check_image_root

    options: BuildConfig = read_options(ctx)
    check_out(options.out, options.model)
    check_exists("source", options.source, "a file or folder")
    check_exists("lexicon", options.lexicon, "a YAML file")
    if options.images is not None:
        check_image_root(options.images)
    if options.format is not None:
        recognise((), options.format, options.source.name)
    from realign.building.run import build as run

    dataset = run(options, dry_run=dry_run)
    if dry_run:
        typer.echo(f"dataset would be {dataset}")
        return
    counts = read_funnel(options.out)
    assert counts is not None
    num_dropped = counts["decisions"]["dropped"]
    dropped = f", {num_dropped} of them dropped by decisions.jsonl" if num_dropped else ""
    num_source_rows = counts["rows"] + counts["unsampled"]
    sampled = f" (a sample of {num_source_rows})" if counts["unsampled"] else ""
    typer.echo(
        f"{counts['accepted']} of {counts['rows']} rows{sampled} accepted{dropped} -> {dataset}"
    )


@app.command(cls=SectionCommand)
def check(ctx: typer.Context) -> None:
    """Check a dataset and list every bad row, without a GPU.

    The exit code is 1 if more rows were rejected than --max-reject allows, and 2 if there was
    nothing to check.
    """
    options: CheckConfig = read_options(ctx)
    from realign.review.check import check as run

    findings = run(options)
    for line in findings.lines(options.show):
        typer.echo(line)
    if options.out:
        typer.echo(f"all findings -> {options.out}")
    if not findings.has_passed:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run (with dataset/, metrics.jsonl or eval/), of an evaluation, or a "
            "dataset."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the folder.")
    ] = None,
    images: Images = None,
) -> None:
    """Write one HTML page about a run or a dataset."""
    from realign.review.report import write_report

    typer.echo(f"report -> {write_report(run, out, images)}")


@app.command()
def browse(
    data: Annotated[
        Path,
        typer.Argument(help="Dataset: folder of `realign build`, parquet, or JSON."),
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 is any free one.")] = 8770,
    decisions: Annotated[
        Path | None,
        typer.Option(
            help="Decision file; by default the dataset's own, which `realign train` follows."
        ),
    ] = None,
    images: Images = None,
) -> None:
    """Look at pairs in the browser, and keep, drop or flag them."""
    from realign.review.browse.serve import serve

    serve(data, images=images, decisions=decisions, port=port)


@app.command()
def export(
    data: Annotated[
        Path,
        typer.Option(help="Dataset: parquet, folder of `realign build`, or JSON."),
    ],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="official, ms-swift, llamafactory or trl.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the files.")],
    images: Images = None,
) -> None:
    """Write a dataset in the format of another trainer."""
    from realign.data.export.run import export as run

    exported = run(data, images, to, out)
    for name, count in exported.counts.items():
        typer.echo(f"{count} {name}")
    typer.echo(f"{to} -> {out}: {exported.note}")
