"""The command ``realign cache`` and those of its group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import check_cache, check_exists, check_out
from realign.cli.sections import SectionGroup, is_for_command, read_options

if TYPE_CHECKING:
    from realign.config import CacheConfig


cache_app = typer.Typer(rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[Path, typer.Argument(help="Folder of `realign cache`, or a cache in it.")]


@cache_app.callback(cls=SectionGroup, invoke_without_command=True)
def cache(ctx: typer.Context) -> None:
    """Compute the reference model's log-probabilities once.

    Without one of the commands below, it builds a cache. Rows are identified by their content, and
    stored rows are not computed again, so a stopped build continues when the same command is given
    again. Processes of accelerate launch or torchrun share the work. Give the options of a command
    below after its name.
    """
    if is_for_command(ctx, "to build"):
        return
    from realign.data.dataset import check_dataset

    options: CacheConfig = read_options(ctx)
    check_out(options.out, options.model)
    check_dataset(options.data, options.images)
    from realign.reference.run import cache as run

    typer.echo(f"reference log-probabilities -> {run(options)}")


@cache_app.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Check every byte of a cache against its hashes.

    Every damaged file is named. The exit code is 2 if there is one.
    """
    check_cache(folder)
    from realign.reference.inspect import verify_cache

    for line in verify_cache(folder):
        typer.echo(line)


@cache_app.command("info")
def cache_info(folder: CacheFolder) -> None:
    """Show what a cache was computed from, its size and its probe."""
    check_cache(folder)
    from realign.reference.inspect import describe_cache

    for line in describe_cache(folder):
        typer.echo(line)


@cache_app.command("merge")
def cache_merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches of the same model and numerics.")],
    out: Annotated[Path, typer.Option(help="Cache folder; rows that it already has are kept.")],
) -> None:
    """Merge caches of the same model and numerics.

    Use it when parts of a dataset were computed on machines without a shared file system. For a
    row that several caches have, the first cache wins.
    """
    check_out(out)
    for folder in caches:
        check_cache(folder)
    from realign.reference.merge import merge_caches

    typer.echo(f"reference log-probabilities -> {merge_caches(caches, out)}")


@cache_app.command("import")
def cache_import(
    data: Annotated[Path, typer.Option(help="Parquet dataset that holds the columns.")],
    model: Annotated[str, typer.Option(help="Model that computed them: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Cache folder.")],
) -> None:
    """Make a cache from the log-probabilities of another trainer.

    They are columns of the dataset: ref_chosen_logps and ref_rejected_logps, as TRL names them, are
    enough for dpo; rdpo also requires ref_image_rejected_logps. Their numerics are unknown, so
    train accepts them only with --accept-numerics, after it has computed 64 rows again.
    """
    check_out(out, model)
    check_exists("data", data, "a dataset file or folder")
    from realign.reference.import_columns import import_columns

    typer.echo(f"reference log-probabilities -> {import_columns(data, model, out)}")
