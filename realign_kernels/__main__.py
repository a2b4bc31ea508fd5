"""``python -m realign_kernels``: report the installation and check its numbers."""

from __future__ import annotations

from realign_kernels.diagnosis import main

if __name__ == "__main__":
    main()
