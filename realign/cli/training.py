"""The commands ``realign train`` and ``realign merge``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import check_cache, check_out
from realign.cli.sections import SectionCommand, read_options

if TYPE_CHECKING:
    from realign.config import TrainConfig


@app.command(cls=SectionCommand)
def train(
    ctx: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, and stop.")
    ] = False,
) -> None:
    """Train a model with rDPO on a preference dataset.

    A stopped run continues when the same command is given again, and ends with the same result.
    """
    from realign.data.dataset import check_dataset

    options: TrainConfig = read_options(ctx)
    check_out(options.out, options.model)
    check_dataset(options.data, options.images)
    check_cache(options.cache, "Check --cache, or leave it out to have the references computed")
    from realign.training.run import train as run

    checkpoint = run(options, dry_run=dry_run)
    if os.environ.get("RANK", "0") == "0":  # once, however many processes train
        typer.echo(f"checkpoint {'would be' if dry_run else '->'} {checkpoint}")


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="Adapter: RUN/checkpoint, or a hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype of the written weights: bfloat16 or float32.")
    ] = "bfloat16",
) -> None:
    """Merge an adapter into its base, for servers without adapters."""
    from realign.modeling.merge import merge as run

    typer.echo(f"model -> {run(model, out, dtype)}")
