"""The ``realign`` command.

A command imports its libraries when it runs, after its options have been checked.
"""

from __future__ import annotations

import sys

try:
    import typer as typer
except ImportError:
    sys.exit(
        "The realign command requires the packages of its pipeline extra. Install them: pip "
        "install 'realign[pipeline]'. The loss alone requires none of them: python -m "
        "realign_kernels reports on it."
    )

from realign.cli import building, cache, evaluation, machine, publishing, training
from realign.cli.app import app, main

__all__ = ["app", "building", "cache", "evaluation", "machine", "main", "publishing", "training"]
