"""The benchmarks that ``realign eval`` knows, and which of them a folder holds."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, MissingData, Rule, Task
from realign.evaluation.benchmarks.amber import AMBER_DISCRIMINATIVE
from realign.evaluation.benchmarks.chair import CHAIR
from realign.evaluation.benchmarks.chair_coco import CHAIR_COCO
from realign.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from realign.evaluation.benchmarks.llava_bench import LLAVA_BENCH
from realign.evaluation.benchmarks.mm_vet import MM_VET
from realign.evaluation.benchmarks.mmbench import MMBENCH
from realign.evaluation.benchmarks.mme import MME
from realign.evaluation.benchmarks.mmhal import MMHAL
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.benchmarks.scienceqa import SCIENCEQA
from realign.evaluation.benchmarks.textvqa import TEXTVQA, VIZWIZ
from realign.runtime.progress import announce

BENCHMARKS: tuple[Benchmark, ...] = (
    POPE,
    HALLUSIONBENCH,
    AMBER_DISCRIMINATIVE,
    CHAIR_COCO,
    CHAIR,
    MME,
    MMBENCH,
    SCIENCEQA,
    TEXTVQA,
    VIZWIZ,
    MMHAL,
    MM_VET,
    LLAVA_BENCH,
)


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name; the one with published data where two have it.

    Raises:
        RefusedError: There is none.
    """
    return _named(name)[0]


def find_rule(name: str, rule: str) -> tuple[Benchmark, Rule]:
    """Return the benchmark of a name that has a rule, and the rule. CHAIR's published data and data
    of one's own are two benchmarks with one name, whose rules differ.

    Raises:
        RefusedError: There is none.
    """
    named = _named(name)
    for benchmark in named:
        if rule in benchmark.rules:
            return benchmark, benchmark.rules[rule]
    known = [rule for benchmark in named for rule in benchmark.rules]
    raise RefusedError(
        f"rule must be one of {', '.join(known)} for {named[0].title}, got {rule!r}. Name one of "
        "them."
    )


def _named(name: str) -> list[Benchmark]:
    named = [benchmark for benchmark in BENCHMARKS if benchmark.name == name]
    if not named:
        known = dict.fromkeys(benchmark.name for benchmark in BENCHMARKS)
        raise RefusedError(
            f"benchmark must be one of {', '.join(known)}, got {name!r}. Name one of them."
        )
    return named


def read_tasks(data: Path) -> dict[str, Task]:
    """Read the tasks to ask a model whose files a folder holds, and announce the missing ones.

    Raises:
        RefusedError: All are missing, or a file has another form than its benchmark requires.
    """
    asked = [benchmark for benchmark in BENCHMARKS if benchmark.table]
    tasks: dict[str, Task] = {}
    absent: list[str] = []
    for benchmark in asked:
        found: dict[str, Task] = {}
        with suppress(MissingData):
            found = benchmark.read_tasks(data)
        first = benchmark.layouts[0].files
        absent += [names[0] for task, names in first.items() if task not in found]
        tasks |= found
    if not tasks:
        raise RefusedError(
            f"data must hold {', '.join(absent[:-1])} or {absent[-1]}, got {data}, which has none. "
            "Write at least one; docs/evaluation.md says what a line holds."
        )
    if absent:
        announce(f"not measured, since {data} does not hold them: {', '.join(absent)}")
    return tasks
