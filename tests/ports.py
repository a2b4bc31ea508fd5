"""Ports of this machine for the servers and the groups of processes that tests start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with closed_port() as port:
        return port


@contextmanager
def closed_port() -> Iterator[int]:
    """Hold a port that refuses every connection: it is taken, and nobody listens on it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
