"""The commands that try an installation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign.cli.app import app
from realign.cli.checks import check_out


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
    """Show what is installed and what this machine would use, and check the kernels' numbers.

    The exit code is 1 if a number is wrong. `python -m realign_kernels` shows and checks the
    kernels alone; it needs PyTorch only.
    """
    from realign.doctor import diagnosis

    lines, is_sound = diagnosis()
    for line in lines:
        typer.echo(line)
    if not is_sound:
        raise typer.Exit(1)
