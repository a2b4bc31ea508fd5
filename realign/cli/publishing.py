"""The commands that write cards and upload folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import check_exists


@app.command()
def card(
    path: Annotated[
        Path,
        typer.Argument(help="Run, folder of a model, or folder with dataset.parquet."),
    ],
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Licence, as the hub names it: apache-2.0, llama2, cc-by-4.0, other. By default "
            "the one that the card of the base model states, if that card is on this machine.",
        ),
    ] = None,
    license_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the licence, with --license other.")
    ] = None,
    license_link: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the licence's text.")
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="Repository to be pushed to; the card's examples name it."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME", help="The base's name on the hub, if it was a local folder."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="The training data's name on the hub."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run that a model comes from, if it is not the folder above it."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Folder of `realign eval`; by default eval/ in the run."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a card that a person has edited.")
    ] = False,
) -> None:
    """Write the card of a model or a dataset for the Hugging Face Hub.

    For a run, the card is README.md in its checkpoint, with base, recipe, data, scores and how to
    load the model; for a dataset, README.md tells how the pairs were made. Everything comes from
    the files of the run; nothing is looked up on the network. An edited card is not replaced.
    """
    from realign.review.cards.card import write_card
    from realign.review.cards.licence import Licence
    from realign.review.cards.model_card import CardOptions

    check_exists("eval", evaluation, "a folder of `realign eval`")
    licence = Licence.given(license, license_name, license_link)
    options = CardOptions(licence, base_model, dataset, repo, run, evaluation)
    typer.echo(f"card -> {write_card(path, options, overwrite=overwrite)}")


@app.command()
def push(
    path: Annotated[
        Path,
        typer.Argument(help="Run, folder of a model, or folder with dataset.parquet."),
    ],
    repo: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Repository; created if it does not exist.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list what would be uploaded, and stop.")
    ] = False,
) -> None:
    """Upload a model or a dataset with its card to the Hugging Face Hub.

    All files go into one commit. Before anything is sent, the folder is checked: its weights must
    be whole, its card must name a licence, and it must not hold anything else, such as optimizer
    states or paths of this machine. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from rich.filesize import decimal

    from realign.review.cards.push import prepare
    from realign.review.cards.push import push as upload_files

    upload = prepare(path, repo)
    visibility = "public" if public else "private"
    total = f"{len(upload.files)} files, {decimal(sum(upload.files.values()))}"
    for name, size in upload.files.items():
        typer.echo(f"{decimal(size):>10}  {name}")
    if upload.left_out:
        typer.echo(f"stays here: {', '.join(upload.left_out)}")
    if dry_run:
        typer.echo(f"{total} would go to the {visibility} {upload.repo_type} {repo}")
        return
    typer.echo(f"{total} -> {upload_files(upload, repo, public=public)}")
