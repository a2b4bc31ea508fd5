"""The commands ``realign init``, ``realign demo`` and ``realign doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import check_out
from realign.errors import RefusedError


@app.command()
def init(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe; without it, all recipes are listed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file; by default RECIPE.yaml here.")
    ] = None,
) -> None:
    """Write a recipe as a YAML file that you can edit.

    The file explains every option. Pass it as --config to the commands whose sections it has.
    """
    from realign.recipe_file import recipe_lines, write_recipe

    if recipe is None:
        if out is not None:
            raise RefusedError(
                f"--out requires a recipe, got {out} alone. `realign init` lists the recipes."
            )
        for line in recipe_lines():
            typer.echo(line)
        return
    typer.echo(f"{recipe} -> {write_recipe(recipe, out or Path(f'{recipe}.yaml'))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of scenes, masks and order of rows.")] = 0,
) -> None:
    """Run every stage on a small embedded model; no GPU, no network."""
    check_out(out)
    from realign.runtime.spinning import limit_spinning

    limit_spinning()  # before torch is loaded
    from realign.demo.run import run_demo

    run_demo(out, seed)


@app.command()
def doctor() -> None:
    """Show what is installed, and check the kernels of this machine.

    The exit code is 1 if a number is wrong. `python -m realign_kernels` shows and checks the
    kernels alone; it needs PyTorch only.
    """
    from realign.doctor import diagnosis

    lines, is_sound = diagnosis()
    for line in lines:
        typer.echo(line)
    if not is_sound:
        raise typer.Exit(1)
