"""Asking a model every question once, in batches that are divided over the processes. Every answer
is on the disk, so that a run that is killed at any moment continues where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from realign.config import EvalConfig
from realign.errors import RefusedError
from realign.evaluation.adapter_effect import adapter_effect
from realign.evaluation.stored_answers import Question
from realign.generation.generator import Answer, Request
from realign.generation.journal import Journal
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.folder import is_adapter
from realign.modeling.loading import choose_dtype
from realign.runtime.files import content_sha256
from realign.runtime.progress import Progress
from realign.runtime.ranks import Ranks

Batch = Sequence[Question]


def ask(
    name: str,
    folder: Path,
    first: Question,
    batches: Sequence[Batch],
    config: EvalConfig,
    ranks: Ranks,
) -> tuple[dict[str, Answer], float | None]:
    """Ask a model, or continue to ask it.

    Args:
        name: Name of the model, for its journal and the progress.
        folder: The model's folder.
        first: The question on which the effect of an adapter is measured.
        batches: From :func:`~realign.evaluation.stored_answers.make_batches`. Their answers do not
            depend on which process asks them.
        config: Options of the model's loading, and the output folder.
        ranks: The processes, all of which call this.
    Returns:
        answers: By :attr:`~realign.evaluation.stored_answers.Question.key`.
        effect: The effect of an adapter (:func:`adapter_effect`); None for a whole model.
    Raises:
        RefusedError: The model or a line of the journal is refused, or an adapter has no effect.
    """
    journal = config.out / "journal" / name
    finished = ranks.run_together(lambda: read_journals(journal))
    ranks.gather(None)  # nobody writes before all have read
    waiting = [batch for batch in batches if batch_key(batch) not in finished]
    effect = _ask_waiting(name, folder, first, waiting, config, ranks)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the model that is gone
    answered = ranks.run_on_first(lambda: read_journals(journal))
    answers = {
        question.key: answer
        for batch in batches
        for question, answer in zip(batch, answered[batch_key(batch)], strict=True)
    }
    return answers, effect


def _ask_waiting(
    name: str,
    folder: Path,
    first: Question,
    waiting: Sequence[Batch],
    config: EvalConfig,
    ranks: Ranks,
) -> float | None:
    """Ask this process's share of the batches; return the effect of an adapter."""
    mine = waiting[ranks.rank :: ranks.world_size]
    has_adapter = is_adapter(folder)
    generator: TransformersGenerator | None = None
    if mine or (ranks.is_first and has_adapter):
        generator = ranks.run_together(
            lambda: TransformersGenerator.load(
                folder, choose_dtype(config.dtype), first.max_new_tokens, config.batch_size
            )
        )
    else:
        ranks.run_together(lambda: None)
    effect = ranks.run_on_first(
        lambda: (
            adapter_effect(
                generator,
                folder,
                Request(first.prompt, first.image),
                allow_none=config.allow_unchanged_adapter,
            )
            if generator and has_adapter
            else None
        )
    )
    ranks.run_together(lambda: _answer(name, generator, mine, config.out, ranks.rank))
    return effect


def _answer(
    name: str,
    generator: TransformersGenerator | None,
    batches: Sequence[Batch],
    out: Path,
    rank: int,
) -> None:
    if not batches:
        return
    assert generator is not None
    with (
        Journal(out / "journal" / name / f"rank-{rank:05d}.jsonl") as journal,
        Progress(f"answers of {name}", sum(map(len, batches))) as progress,
    ):
        for batch in batches:
            requests = [Request(question.prompt, question.image) for question in batch]
            answers = generator.generate(requests, batch[0].max_new_tokens)
            written = [[answer.text, answer.is_cut, answer.num_tokens] for answer in answers]
            journal.append(batch_key(batch), {"answers": written})
            progress.advance(len(batch))


def batch_key(batch: Batch) -> str:
    """Return the key of a batch in a journal: its questions in their order."""
    return content_sha256(*(question.key for question in batch))


def read_journals(folder: Path) -> dict[str, list[Answer]]:
    """Read the batches that the processes of this run, or of earlier ones, have answered. A line
    that a killed process left unfinished is skipped.

    Returns:
        answers: By :func:`batch_key`.
    Raises:
        RefusedError: A whole line is damaged.
    """
    found: dict[str, list[Answer]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    found[entry["key"]] = [_read(answer) for answer in entry["answers"]]
                except (ValueError, KeyError, TypeError):
                    raise RefusedError(
                        f"{path}, line {number} must be the answers to a batch, got "
                        f"{line[:60]!r}. Remove the line: its questions are then asked again."
                    ) from None
    return found


def _read(written: list[object]) -> Answer:
    text, is_cut, num_tokens = written
    assert isinstance(text, str)
    assert isinstance(num_tokens, int)
    return Answer(text, bool(is_cut), num_tokens=num_tokens)
