"""Writing of stored answers in the forms that the published programs read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from realign.errors import RefusedError
from realign.evaluation.answer_files import Answered, read_answers
from realign.evaluation.answer_forms import FORMS, Form, Request
from realign.evaluation.benchmark import Benchmark
from realign.evaluation.registry import find_benchmark
from realign.runtime.files import new_folder, write_text


class Report(NamedTuple):
    """The result of writing answers."""

    out: Path
    number: int
    """Number of answers, or of questions."""
    notes: Sequence[str]
    """Notes on changes to the answers, and on limits of the file."""


def write(
    benchmark: str,
    data: Path | str,
    format: str,
    out: Path | str,
    answers: Path | str | Sequence[Path | str] = (),
    *,
    model: str = "",
    allow_subset: bool = False,
) -> Report:
    """Write answers in a form that the published programs of a benchmark read.

    Args:
        benchmark: Its name; docs/guides/evaluation.md lists all.
        data: Folder with the benchmark's published files.
        format: Name of the form, such as ``llava`` or ``official``.
        out: A new file, or a new folder for forms of several files.
        answers: One or more files of answers, in any format that is read; none for forms of
            questions.
        model: Name of the model in LLaVA's files; by default the name of the first file.
        allow_subset: Whether to write the existing answers if others are missing and the published
            program does not need them.
    Returns:
        report: The number of written answers, and notes on changes to them.
    Raises:
        RefusedError: A name is unknown, ``out`` exists, a file is missing or has another form, or
            the answers are not those of the data.

    Example::

        >>> from realign.evaluation import write
        >>> write("pope", "pope", "llava", "llava.jsonl", "answers.jsonl").number
        4
    """
    chosen, out, data = find_benchmark(benchmark), Path(out), Path(data)
    form = _find_form(chosen, format)
    paths = [Path(path) for path in ([answers] if isinstance(answers, (str, Path)) else answers)]
    if form.needs_answers != bool(paths):
        rule = "name a file" if form.needs_answers else "be left out for a file of questions"
        raise RefusedError(
            f"answers must {rule}, got {', '.join(map(str, paths)) or 'none'}. Correct --answers."
        )
    if out.exists():
        raise RefusedError(f"out must be new, got {out}, which exists. Name another, or remove it.")
    if form.suffixes and out.suffix not in form.suffixes:
        raise RefusedError(
            f"out must end in {' or '.join(form.suffixes)}, got {out.name}. Name it so; a table "
            "program can save it as .xlsx."
        )
    tasks = {name: task.rows for name, task in chosen.read_tasks(data).items()}
    answered = {name: [Answered(row, "") for row in rows] for name, rows in tasks.items()}
    if form.needs_answers:
        found = read_answers(
            chosen,
            paths,
            tasks,
            covers=lambda row: True,
            allows_subset=allow_subset and not form.needs_all,
        )
        by_row = {id(item.row): item for item in found}
        answered = {
            name: [by_row[id(row)] for row in rows if id(row) in by_row]
            for name, rows in tasks.items()
        }
    name = model or (paths[0].stem if paths else "")
    written = form.write(Request(answered, data, name, out))
    if [*written.files] == [""]:
        write_text(out, written.files[""])
    else:
        with new_folder(out) as folder:
            for file, text in written.files.items():
                write_text(folder / file, text)
    return Report(out, sum(map(len, answered.values())), written.notes)


def _find_form(benchmark: Benchmark, name: str) -> Form:
    known = FORMS.get(benchmark.name, {})
    if name not in known:
        listed = ", ".join(known) or "none"
        raise RefusedError(
            f"format must be one that can be written of {benchmark.title} ({listed}), got "
            f"{name!r}. Name one of them."
        )
    return known[name]
