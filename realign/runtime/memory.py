"""Memory and cores that this process may use, which may be less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path


def usable_memory(root: Path = Path("/")) -> int:
    """Return the bytes of physical memory, or the strictest limit of the control groups if lower.

    Args:
        root: Folder that holds ``proc`` and ``sys``.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_limits(root)])


def _limits(root: Path) -> list[int]:
    """Return the limits of the process's control groups and their parents, of version 1 or 2.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    groups = root / "proc/self/cgroup"
    if not groups.is_file():  # another system than Linux
        return []
    limits = []
    for line in groups.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # a container may see the host's name of the group, but only the topmost folder
        inner = top / group.strip("/")
        for folder in (inner, *inner.parents[: len(inner.parts) - len(top.parts)]):
            if (folder / name).is_file():
                text = (folder / name).read_text().strip()
                limits += [int(text)] if text != "max" else []
    return limits


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(affinity(0)) if affinity else os.cpu_count() or 1
