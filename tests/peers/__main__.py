"""Run a peer's own tests against our entry: ``python -m tests.peers PEER SOURCE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.peers.run import RefusedSourceError, read_left_out, run
from tests.peers.table import PEERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where all passed, 1 where something is wrong, 2 where nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument(
        "source", type=Path, nargs="?", help="root of a checkout or unpacked source distribution"
    )
    given = parser.parse_args(arguments)
    peer = PEERS[given.peer]
    source = given.source or peer.source
    if source is None:
        parser.error(f"source is required for {given.peer}. Pass the root of its checkout.")
    try:
        report = run(peer, source.resolve(), read_left_out().get(given.peer, []))
    except RefusedSourceError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.peer}: " + "\n".join(report.lines()))
    return 0 if report.has_passed else 1


if __name__ == "__main__":
    sys.exit(main())
