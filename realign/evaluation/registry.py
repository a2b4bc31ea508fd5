"""The benchmarks that ``realign eval`` knows, and which of them a folder holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from realign.errors import RefusedError
from realign.evaluation.benchmark import Benchmark, MissingData, Rule, Task
from realign.evaluation.benchmarks.amber import AMBER_DISCRIMINATIVE
from realign.evaluation.benchmarks.amber_generative import AMBER_GENERATIVE
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
from realign.evaluation.rows import check_ids
from realign.runtime.progress import announce

BENCHMARKS: tuple[Benchmark, ...] = (
    POPE,
    HALLUSIONBENCH,
    AMBER_GENERATIVE,
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


PARTS = {"amber": (AMBER_GENERATIVE, AMBER_DISCRIMINATIVE)}
"""Names that stand for several benchmarks, whose answers may lie in one file. Only ``realign eval
score`` takes them.
"""


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark with a name; of two with the same name, the one with published data.

    Raises:
        RefusedError: No benchmark has the name.
    """
    return _named(name)[0]


def find_rule(name: str, rule: str, *, takes_parts: bool = False) -> tuple[Benchmark, Rule]:
    """Return the benchmark with a name that has a rule, and the rule.

    CHAIR on the published data and CHAIR on the user's own data are two benchmarks with one name
    and different rules.

    Args:
        name: Name of the benchmark.
        rule: Name of the rule.
        takes_parts: Whether the message about an unknown name also lists those of :data:`PARTS`.
    Raises:
        RefusedError: No benchmark has the name, or none with the name has the rule.
    """
    named = _named(name, [*PARTS] if takes_parts else [])
    for benchmark in named:
        if rule in benchmark.rules:
            return benchmark, benchmark.rules[rule]
    known = [rule for benchmark in named for rule in benchmark.rules]
    raise RefusedError(
        f"rule must be one of {', '.join(known)} for {named[0].title}, got {rule!r}. Name one of "
        "them."
    )


def read_rule_tasks(
    benchmark: Benchmark, rule: str, data: Path, named: Callable[[], Collection[str]]
) -> dict[str, Task]:
    """Read the rows of every task of a benchmark, for a rule to score.

    Args:
        benchmark: Benchmark from :func:`find_rule`.
        rule: Name of the rule.
        data: Folder with the benchmark's files.
        named: Function that returns the keys of the questions that answers name.
    Raises:
        MissingData: The folder has no file of the benchmark. If it has files of another form of the
            benchmark, the message names the rules that read those.
        RefusedError: A file has another form.
    """
    try:
        return benchmark.read_tasks(data, named)
    except MissingData as error:
        for other in BENCHMARKS:
            if other.name != benchmark.name or other is benchmark:
                continue
            if file := next(
                filter(None, (layout.first_in(data) for layout in other.layouts)), None
            ):
                wanted = benchmark.layouts[0].files
                raise MissingData(
                    f"data must hold {next(iter(wanted.values()))[0]} for the rule {rule} of "
                    f"{benchmark.title}, got {data}, which has {file}. Pass --rule "
                    f"{' or '.join(other.rules)}, which reads that, or check --data."
                ) from error
        raise


def _named(name: str, parts: Sequence[str] = ()) -> list[Benchmark]:
    named = [benchmark for benchmark in BENCHMARKS if benchmark.name == name]
    if name in PARTS:
        both = " or ".join(part.name for part in PARTS[name])
        raise RefusedError(
            f"benchmark must be a part of {name} here, {both}, got {name!r}. Name one of them; "
            f"`realign eval score` alone takes {name}."
        )
    if not named:
        known = dict.fromkeys([*(benchmark.name for benchmark in BENCHMARKS), *parts])
        raise RefusedError(
            f"benchmark must be one of {', '.join(known)}, got {name!r}. Name one of them."
        )
    return named


def find_data(data: Path, names: Sequence[str]) -> dict[Benchmark, Path]:
    """Return the folder with the files of each benchmark to ask: ``data`` itself, or its subfolder
    with the benchmark's name.

    Args:
        data: Folder of all benchmarks.
        names: Names of the benchmarks to ask. Without names, all benchmarks with files are asked,
            and the others are announced.
    Raises:
        RefusedError: A name is unknown or given twice, a named benchmark has no files, no benchmark
            has files, or a benchmark has files in both folders or in two forms that cannot be asked
            together.
    """
    if again := next((name for name in names if names.count(name) > 1), None):
        raise RefusedError(f"benchmark must name each one once, got {again!r} again. Drop one.")
    known = dict.fromkeys(benchmark.name for benchmark in BENCHMARKS)
    forms = {
        name: [form for form in _named(name) if form.prompts]
        for name in dict.fromkeys(names or known)
    }
    found = {
        form: folder
        for named in forms.values()
        for form in named
        if (folder := _folder_of(form, data))
    }
    form_names = [form.name for form in found]
    if twice := next((name for name in form_names if form_names.count(name) > 1), None):
        named = (form for form in found if form.name == twice)
        both = " and ".join(str(form.find_layout(found[form]).first_in(data)) for form in named)
        raise RefusedError(
            f"data must hold {twice} in one form, got {both} in {data}. Move one of them into "
            "another folder."
        )
    absent = [name for name in forms if name not in form_names]
    if absent and names:
        forms[absent[0]][-1].find_layout(data)  # raises, and names the files it looks for
    if not found:
        files = [
            f"{form.name}: {next(iter(form.layouts[0].files.values()))[0]}"
            for named in forms.values()
            for form in named
        ]
        raise RefusedError(
            f"data must hold the files of a benchmark ({'; '.join(files)}; and so on), got {data}, "
            "which has none. Check --data; docs/guides/evaluation.md lists all files."
        )
    if absent:
        announce(f"not asked, since {data} does not hold them: {', '.join(absent)}")
    return found


def read_tasks(folders: Mapping[Benchmark, Path]) -> dict[str, Task]:
    """Read the tasks of benchmarks, and announce those that are missing or not read.

    Args:
        folders: Folders from :func:`find_data`.
    Raises:
        RefusedError: A file has another form than its benchmark requires, or two questions have
            the same id.
    """
    tasks: dict[str, Task] = {}
    for benchmark, folder in folders.items():
        name = benchmark.name
        found, layout = benchmark.read_tasks(folder), benchmark.find_layout(folder)
        if not any(task.rows for task in found.values()):  # CHAIR without a list of images
            raise RefusedError(
                f"{name}: {folder} must say what is asked, got no question. Add the list of images "
                "that docs/guides/evaluation.md names."
            )
        check_ids({task: read.rows for task, read in found.items()})
        absent = [files[0] for task, files in layout.files.items() if task not in found]
        if absent:
            announce(f"{name}: {folder} does not hold {', '.join(absent)}")
        others = [other for other in benchmark.layouts if other is not layout]
        if unread := [file for other in others if (file := other.first_in(folder))]:
            announce(
                f"{name}: {layout.first_in(folder)} and so on are read; {' and '.join(unread)} in "
                f"{folder} are not. Move what is to be asked into another folder"
            )
        tasks |= found
    return tasks


def _folder_of(benchmark: Benchmark, data: Path) -> Path | None:
    found = []
    for folder in (data, data / benchmark.name):
        with suppress(MissingData):
            benchmark.find_layout(folder)
            found.append(folder)
    if len(found) > 1:
        raise RefusedError(
            f"data must hold {benchmark.title} once, got files of it in {found[0]} and in "
            f"{found[1]}. Move those that are not to be asked."
        )
    return found[0] if found else None
