"""The table of docs/results/retrieval.md, from ``benchmarks/results/cpu_retrieval.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import load

HEADER = (
    "| vectors | exact | faiss flat | ratio | recall@10 | peak memory / vectors |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def retrieval_block(results: Path) -> str:
    """Return the text between the marks."""
    content = load(results / "cpu_retrieval.json")
    if not content["cells"]:
        return "*Retrieval has not been measured yet: `python -m benchmarks.retrieval`.*"
    lines = [line(key, cell) for key, cell in sorted(content["cells"].items())]
    run = content["runs"][max(content["runs"], key=int)]
    note = (
        "Exact top-10 of 1,000 queries, ours and faiss-cpu's flat index in turn (medians); recall "
        "against it; peak memory of a process that reads the stored vectors and searches, Python "
        "and its libraries included. faiss holds float32 only. Made by "
        f"`{run['command']}` at {run['commit']}, torch {run['versions']['torch']}, faiss "
        f"{run['faiss']}, {run['device']}, {run['threads']} threads."
    )
    return "\n".join([HEADER, *lines, "", note])


def line(key: str, cell: dict[str, Any]) -> str:
    """Return a cell as a row of the table."""
    dtype, size = key.split("/")[-2:]
    return (
        f"| {cell['images']:,} x {size} {dtype} | {cell['ms'] / 1e3:.2f} s | "
        f"{cell['faiss_flat']['ms'] / 1e3:.2f} s | {cell['ratio_to_faiss_flat']:.2f} | "
        f"{cell['recall']:.3f} | {cell['process_peak_over_vectors']:.2f} |"
    )
