"""``python -m realign_kernels``: what is installed, and whether its numbers are right here."""

from __future__ import annotations

from realign_kernels.diagnosis import main

if __name__ == "__main__":
    main()
