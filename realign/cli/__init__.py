"""The ``realign`` command.

A command imports its libraries when it runs, after its options have been checked.
"""

from __future__ import annotations

import sys

try:
    import typer as typer
except ImportError:
    sys.exit(
        "The realign command needs its pipeline packages. Install them: pip install "
        "'realign[pipeline]'. For the loss alone they are not needed: python -m realign_kernels "
        "shows what it has here."
    )

from realign.cli import building, cache, evaluation, machine, publishing, training
from realign.cli.app import app, main

__all__ = ["app", "building", "cache", "evaluation", "machine", "main", "publishing", "training"]
