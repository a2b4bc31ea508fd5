"""Top-10 among a million vectors, ours and faiss flat in turn: ``python -m benchmarks.retrieval``.

It writes ``benchmarks/results/cpu_retrieval.json``.  Time: both search the same vectors in the
order A B B A (faiss in float32); medians.  Recall: against faiss, where another row with the same
cosine to float32 rounding counts as found.  Memory: a separate process reads the vectors from the
store and searches; its peak of resident memory is compared with that after all libraries were
loaded and used once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleave, summary
from benchmarks.result_files import RESULTS, environment, merge
from benchmarks.retrieval.table import HEADER, line
from realign.building.retrieval.embedding_store import EmbeddingStore
from realign.building.retrieval.exact import ExactIndex

TOP = 10
DTYPES = {"float32": torch.float32, "float16": torch.float16}
CASES = ("float32/512", "float16/1024")
_SHARD = 8192
_ROUNDING = 1e-6

_MEMORY = """
import sys, torch
from pathlib import Path
from benchmarks.retrieval.__main__ import digest_shards, unit_rows
from realign.building.retrieval.exact import ExactIndex
from realign.building.retrieval.embedding_store import EmbeddingStore

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

folder, images, dtype, size, queries, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
warm = unit_rows(4096, int(size))
ExactIndex(warm).search(warm[:1024], 10)
del warm
before = resident("VmRSS")
store = EmbeddingStore(Path(folder), {}, getattr(torch, dtype))
vectors = store.read(digest_shards(int(images)))
ExactIndex(vectors).search(vectors[: int(queries)], 10)
print(vectors.nbytes, before, resident("VmHWM"))
"""


def unit_rows(rows: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return random unit vectors, made in blocks, since a float32 copy of all would take memory."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(rows, size, dtype=dtype)
    for part in vectors.split(_SHARD):
        part.copy_(
            torch.nn.functional.normalize(torch.randn(part.shape, generator=generator), dim=1)
        )
    return vectors


def digest_shards(images: int) -> list[list[str]]:
    """Return stand-ins for the images' digests, one list per shard."""
    return [
        [str(n) for n in range(start, min(start + _SHARD, images))]
        for start in range(0, images, _SHARD)
    ]


def recall(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Return the share of the true neighbours that was found; ties up to rounding count."""
    is_same = (truth[1][:, :, None] == found[1][:, None, :]).any(2)
    is_equal = (found[0] - truth[0]).abs() <= _ROUNDING  # place by place, best first
    return (is_same | is_equal).float().mean().item()


def measure(vectors: Tensor, queries: Tensor, repeats: int) -> dict[str, Any]:
    """Time our search and that of faiss flat, which holds float32 copies of the vectors."""
    import faiss

    index = ExactIndex(vectors)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    for part in vectors.split(_SHARD):
        flat.add(part.float().numpy())
    asked = queries.float().numpy()
    found, truth = index.search(queries, TOP), flat.search(asked, TOP)
    ours, theirs = interleave(
        lambda: index.search(queries, TOP),
        lambda: flat.search(asked, TOP),
        torch.device("cpu"),
        seconds=1e9,
        repeats=repeats,
    )
    timing, peer = summary(ours), summary(theirs)
    return {
        "status": "ok",
        **timing,
        "faiss_flat": peer,
        "ratio_to_faiss_flat": timing["ms"] / peer["ms"],
        "recall": recall(found, (torch.from_numpy(truth[0]), torch.from_numpy(truth[1]))),
    }


def memory(vectors: Tensor, queries: int, threads: int) -> dict[str, float]:
    """Store the vectors, read and search them in another process, and return its peak."""
    images, size = vectors.shape
    dtype = str(vectors.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingStore(Path(folder), {}, vectors.dtype)
        for number, digests in enumerate(digest_shards(images)):
            store.write(number, vectors[number * _SHARD :][: len(digests)], digests)
        arguments = [folder, str(images), dtype, str(size), str(queries), str(threads)]
        output = subprocess.run(
            [sys.executable, "-c", _MEMORY, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=RESULTS.parents[1],
        ).stdout
    own, before, peak = map(int, output.split())
    return {
        "vector_bytes": own,
        "process_bytes_before": before,
        "peak_bytes": peak,
        "peak_over_vectors": (peak - before) / own,
        "process_peak_over_vectors": peak / own,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="for a checkout without git")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    import faiss

    faiss.omp_set_num_threads(options.threads)
    run = environment(torch.device("cpu"), options.commit)
    run |= {"command": "python -m benchmarks.retrieval", "faiss": faiss.__version__}
    print(HEADER)
    for case in options.cases:
        dtype, size = case.split("/")
        vectors = unit_rows(options.images, int(size), DTYPES[dtype])
        sizes = {"images": options.images, "queries": options.queries, "top": TOP}
        cell = sizes | memory(vectors, options.queries, options.threads)
        queries = unit_rows(options.queries, int(size), DTYPES[dtype], seed=1)
        cell |= measure(vectors, queries, options.repeats)
        key = f"retrieval/{options.images}/{case}"
        merge(options.out / "cpu_retrieval.json", run, {key: cell})
        print(line(key, cell), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
