"""A container's limit counts where it is less than the machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from realign.runtime.memory import usable_memory

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "1000000\n"}, 1000000),
        ("0::/", {"memory.max": "max\n"}, PHYSICAL),
        ("0::/", {}, PHYSICAL),
        # of the group, and of the one above it
        ("0::/a/b", {"a/memory.max": "5000", "a/b/memory.max": "max"}, 5000),
        ("0::/a/b", {"a/memory.max": "5000", "a/b/memory.max": "4000"}, 4000),
        # named as the host sees it
        ("0::/docker/0123", {"memory.max": "7000"}, 7000),
        ("4:memory:/a\n0::/", {"memory/memory.limit_in_bytes": "3000"}, 3000),
        ("4:cpu,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
        # version 1 has a large number for none
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, PHYSICAL),
        ("3:cpuset:/a", {"cpuset/a/memory.max": "1"}, PHYSICAL),
    ],
)
def test_the_strictest_limit_of_memory_is_found(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_memory(tmp_path) == expected


def test_usable_memory_without_control_groups_is_that_of_the_machine(tmp_path: Path) -> None:
    assert usable_memory(tmp_path) == PHYSICAL
    assert 0 < usable_memory() <= PHYSICAL
