"""The ``realign`` program: the group of its commands, and their exit codes."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from realign.errors import RefusedError
from realign.runtime.write_errors import explain_file_errors

# set for this process and its workers, before they import any of these libraries
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of transformers too
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Commands(TyperGroup):
    """All commands, in the order of their use.

    A refusal, a full disk or a missing permission exits with code 2, a number that is not finite
    with 1, SIGTERM with 143; any other failure shows its traceback and exits with 1.
    """

    ORDER = (
        "init",
        "build",
        "check",
        "cache",
        "train",
        "eval",
        "report",
        "browse",
        "export",
        "merge",
        "card",
        "push",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of their use; typer would put groups last."""
        others = [name for name in super().list_commands(ctx) if name not in self.ORDER]
        return [*self.ORDER, *others]

    def invoke(self, ctx: Any) -> Any:
        """Run the command of the command line."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # a letter that the terminal lacks must not end a command that has done its work
                stream.reconfigure(errors="backslashreplace")
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            with explain_file_errors():
                return super().invoke(ctx)
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, KeyboardInterrupt) or stop.code == 143:
                typer.echo("realign: stopped. The same command continues what it began.", err=True)
            raise
        except RefusedError as error:
            typer.secho(f"realign: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        except FloatingPointError as error:  # a guard names the step or the rows
            typer.secho(f"realign: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="realign",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut off long flags in 80 columns
    context_settings={"max_content_width": 100},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"realign {version('realign')}")
        raise typer.Exit


@app.callback()
def realign(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Align a vision-language model: build preference pairs, train with rDPO, and evaluate."""


def main() -> None:
    """Run the console script."""
    app()
