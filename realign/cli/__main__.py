"""``python -m realign.cli``, for launchers that take a module."""

from __future__ import annotations

from realign.cli import main

main()
