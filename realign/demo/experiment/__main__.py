"""``python -m realign.demo.experiment``: run the experiment of docs/experiment.md, from pairs to
tables. The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from realign.demo.data import MODEL
from realign.demo.experiment.figures import figures
from realign.demo.experiment.protocol import FULL, SMOKE
from realign.demo.experiment.results import results, seconds
from realign.demo.experiment.stages import Experiment
from realign.demo.experiment.tables import tables
from realign.errors import RefusedError
from realign.runtime.files import write_json, write_text
from realign.runtime.memory import usable_cores
from realign.runtime.progress import announce


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=MODEL, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="folder of runs")
    parser.add_argument(
        "--results", type=Path, help="folder of results and tables; by default the one of --out"
    )
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes")
    parser.add_argument("--smoke", action="store_true", help="a small run to test the code")
    parser.add_argument("--only-tune", action="store_true", help="stop before the reporting runs")
    parser.add_argument(
        "--only-tables", action="store_true", help="after tuning, report finished runs only"
    )
    args = parser.parse_args()
    try:
        experiment = Experiment(SMOKE if args.smoke else FULL, args.base, args.out, args.workers)
        experiment.tune()
        if args.only_tune:
            return 0
        if not args.only_tables:
            experiment.report()
        found = results(experiment)
    except RefusedError as error:
        announce(str(error))
        return 2
    place = args.results or args.out
    write_json(place / "results.json", found)
    write_text(place / "tables.md", tables(found))
    for name, figure in figures(found).items():
        write_text(place / name, figure)
    write_json(args.out / "seconds.json", seconds(experiment))
    announce(f"{sum(seconds(experiment).values()):.0f} CPU seconds; results in {place}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
