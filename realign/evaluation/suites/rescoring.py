"""Scoring of the answers that a suite stored, under all rules of their benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.errors import RefusedError
from realign.evaluation.answer_scores import score
from realign.evaluation.registry import find_benchmark
from realign.evaluation.rows import Row
from realign.runtime.files import file_sha256, write_jsonl


def check_files(data: Path, digests: Mapping[str, str]) -> None:
    """Refuse data that has changed since questions were made from it.

    Args:
        data: Folder with the files.
        digests: SHA-256 of each file at that time, by its name.
    Raises:
        RefusedError: A file is missing or another.
    """
    for name, digest in digests.items():
        path = data / name
        if not path.is_file() or file_sha256(path) != digest:
            raise RefusedError(
                f"{path} must be the file that the questions were made of, got "
                f"{'another' if path.is_file() else 'none'}. Give the folder that has it as --data."
            )


def rescore(
    benchmark: str, answered: Sequence[tuple[Row, str]], data: Path, path: Path, bootstrap: int
) -> tuple[dict[str, Any], list[str]]:
    """Store answers in this project's form, and score them under every rule that needs neither a
    judge nor packages that this project does not install.

    Args:
        benchmark: Its name.
        answered: Rows of the benchmark's data with their answers.
        data: Folder with the benchmark's files.
        path: File to store the answers in.
        bootstrap: Number of draws for intervals; 0 for none.
    Returns:
        scores: Scores by rule; ``subset`` states whether answers are a part of the benchmark.
        notes: Notes on rules that were left out.
    """
    has_ids = all("id" in row for row, _ in answered)
    write_jsonl(
        path,
        (
            {"id": row["id"], "answer": text}
            if has_ids
            else {"image": row["image"], "text": row["text"], "answer": text}
            for row, text in answered
        ),
    )
    rules = find_benchmark(benchmark).rules
    scores, notes = {}, []
    for name, rule in rules.items():
        if rule.judging is not None:
            notes.append(f"{benchmark}: the rule {name} needs a judge's verdicts.")
        elif rule.needs_packages:
            notes.append(
                f"{benchmark}: the rule {name} requires packages that this project does not "
                f"install. With them, score {path} by `realign eval score`."
            )
        else:
            scores[name] = score(
                benchmark, path, data, name, allow_subset=True, bootstrap=bootstrap
            )
    return scores, notes
