"""The tables of README and docs, from ``benchmarks/results/``: ``python -m benchmarks.tables``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.demo.tables import TABLES, experiment_block
from benchmarks.head.tables import head_block
from benchmarks.retrieval.table import retrieval_block
from benchmarks.step.table import step_block

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/experiment.md",
    *(f"docs/results/{name}.md" for name in ("head", "retrieval", "step", "tuning")),
)


def marks(name: str) -> tuple[str, str]:
    """Return the two lines that enclose a table."""
    return f"<!-- {name}: python -m benchmarks.tables -->", f"<!-- end of {name} -->"


BLOCKS = {
    **{marks(name): partial(experiment_block, name) for name in TABLES},
    marks("retrieval table"): retrieval_block,
    marks("head table"): head_block,
    marks("step table"): step_block,
}


def with_tables(page: str) -> str:
    """Return a page whose marked tables are written anew."""
    for (begin, end), make in BLOCKS.items():
        if begin not in page:
            continue
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{make(ROOT / 'benchmarks' / 'results')}\n{end}{after}"
    return page


def main() -> None:
    """Rewrite the pages."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
