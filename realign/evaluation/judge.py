"""The command ``realign eval judge``: let a model behind a server judge answers.

<out>                     {"id", "answer", "judge_reply", "judge"}, one line per answer
<out>.journal.jsonl       every reply of the server, so that a stopped command continues
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from realign.errors import RefusedError
from realign.evaluation.answer_files import Answered, read_answers
from realign.evaluation.benchmark import Benchmark
from realign.evaluation.judge_prompt import JudgePrompt, read_prompt
from realign.evaluation.judging import JUDGE, REPLY, Judge
from realign.evaluation.registry import BENCHMARKS, find_benchmark
from realign.evaluation.rows import Row
from realign.generation.endpoint import Endpoint
from realign.generation.endpoint_generator import EndpointGenerator, Sampling
from realign.generation.generator import Answer
from realign.runtime.files import read_jsonl, write_jsonl
from realign.runtime.progress import Progress

HIGHEST = 2.0  # the highest temperature that servers accept
ROUND = 16  # a round has this many times the concurrent requests; progress is shown after each


@dataclass(frozen=True)
class JudgeModel:
    """The model that judges, and options that replace those of a benchmark's judge.

    Attributes:
        endpoint: Server of the model.
        name: Name of the model on the server.
        temperature: Temperature of the first try; by default that of the benchmark's judge.
        sends_temperature: False for models that accept no temperature.
        max_tokens: Longest reply; by default that of the benchmark's judge.
        length_field: Name of that limit in a request.
    """

    endpoint: Endpoint
    name: str
    temperature: float | None = None
    sends_temperature: bool = True
    max_tokens: int | None = None
    length_field: Any = "max_completion_tokens"


class Judged(NamedTuple):
    """The result of asking a judge.

    Attributes:
        answers: Number of all answers.
        read: Number of answers that a judge had to read.
        without_verdict: Number of gradings without a reply, or whose last reply has no verdict.
        asked: Number of requests that the server answered during this call.
        from_journal: Number of requests whose replies an earlier call had stored.
    """

    answers: int
    read: int
    without_verdict: int
    asked: int
    from_journal: int


def judge(
    benchmark: str,
    answers: Sequence[Path],
    data: Path,
    out: Path,
    model: JudgeModel,
    *,
    prompt: Path | None = None,
    repeat: int = 1,
    allow_subset: bool = False,
) -> Judged:
    """Have a model judge answers, and store its replies beside them.

    Every reply is written to a journal before it is used, so that the same command continues a
    stopped one. If a reply has no verdict, the judge is asked again, up to the number of tries of
    the benchmark; the last reply is stored.

    Args:
        benchmark: Name of the benchmark.
        answers: Files of answers, in any format of the benchmark.
        data: Folder with the benchmark's published files.
        out: JSON lines that :func:`realign.evaluation.score` reads.
        model: Model that judges.
        prompt: Template of the prompt; by default this project's.
        repeat: Number of gradings of every answer.
        allow_subset: Whether questions may lack an answer.
    Raises:
        RefusedError: The benchmark has no judge, the prompt lacks a placeholder, a file has another
            form, ``out`` holds something else, or the server refuses or fails.
    """
    chosen = find_benchmark(benchmark)
    by = chosen.judge
    if by is None:
        names = ", ".join(known.name for known in BENCHMARKS if known.judge)
        raise RefusedError(
            f"benchmark must be one that a judge scores ({names}), got {benchmark}. Score its "
            "answers with `realign eval score`."
        )
    if repeat < 1:
        raise RefusedError(f"repeat must be at least 1, got {repeat}. Pass 3 to see the spread.")
    journal = out.with_name(f"{out.name}.journal.jsonl")
    _check_out(out, journal, answers, model.name)
    template = read_prompt(chosen, prompt)
    tasks = {name: task.rows for name, task in chosen.read_tasks(data).items()}
    covers = chosen.rules[by.rule].covers
    answered = read_answers(chosen, answers, tasks, covers=covers, allows_subset=allow_subset)
    pieces = _Pieces(chosen, by, template, answered)
    gradings = [_Grading(k, pieces, model, journal) for k in range(repeat)]
    with Progress(
        f"{chosen.title}, judged by {model.name}", repeat * len(pieces.asked)
    ) as progress:
        for grading in gradings:
            grading.ask(progress)
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.touch()  # even if no request was sent: it shows that this command wrote ``out``
    write_jsonl(out, [_record(item, pieces, gradings, model) for item in answered])
    return Judged(
        len(answered),
        len(pieces.asked),
        sum(grading.without_verdict for grading in gradings),
        sum(grading.counts[0] for grading in gradings),
        sum(grading.counts[1] for grading in gradings),
    )


def _check_out(out: Path, journal: Path, answers: Sequence[Path], name: str) -> None:
    """Refuse to overwrite anything but a file of the same judge.

    If the judge had to read no answer of a file, as may happen with MMBench, the journal beside the
    file shows that this command wrote it.
    """
    if not out.exists():
        return
    if out.is_dir() or out.resolve() in {path.resolve() for path in answers}:
        raise RefusedError(f"out must be a new file, got {out}. Name another one.")
    judged = [row[JUDGE] for row in read_jsonl(out) if isinstance(row, dict) and JUDGE in row]
    if not judged and journal.is_file():
        return
    by = judged[0] if judged else None
    if not isinstance(by, dict) or by.get("model") != name:
        raise RefusedError(
            f"out must be a new file, or one that {name} judged, got {out}, which is another. Name "
            "another one."
        )


class _Pieces:
    """The answers to ask about, all prepared before the first request, to refuse early."""

    def __init__(
        self, benchmark: Benchmark, by: Judge, template: JudgePrompt, answered: Sequence[Answered]
    ) -> None:
        rule = benchmark.rules[by.rule]
        assert rule.judging is not None
        self.by, self.template, self.judging = by, template, rule.judging
        self.values: dict[str, Mapping[str, str]] = {}  # by the id of a row
        self.asked: list[Row] = []
        for item in answered:
            answer = rule.prepare(item.answer)
            if rule.judging.asks_about(item.row, answer):
                self.asked.append(item.row)
                self.values[item.row["id"]] = by.values(item.row, answer)

    def prompt_name(self, row: Row) -> str:
        """Return the prompt's name, which states whether the data supply a part of the prompt."""
        taken = [name for name in self.template.defaults if name in self.values[row["id"]]]
        return self.template.name + (f" with the data's {taken[0]}" if taken else "")


class _Grading:
    """One grading of all answers."""

    def __init__(self, number: int, pieces: _Pieces, model: JudgeModel, journal: Path) -> None:
        self._number, self._pieces, self._model, self._journal = number, pieces, model, journal
        self.replies: dict[str, Answer] = {}
        self.without_verdict = 0
        self.counts = (0, 0)

    def ask(self, progress: Progress) -> None:
        """Ask about every answer, and again about those whose reply holds no verdict."""
        waiting = self._pieces.asked
        for attempt in range(self._pieces.by.tries):
            if not waiting:
                break
            sampling = self.sampling(attempt)
            with EndpointGenerator(self._model.endpoint, sampling, self._journal) as generator:
                waiting = self._ask(generator, waiting, attempt, progress)
                counts = generator.counts
            self.counts = (self.counts[0] + counts.asked, self.counts[1] + counts.from_journal)
        self.without_verdict = len(waiting) + sum(
            answer.problem != "" for answer in self.replies.values()
        )
        progress.advance(len(waiting))

    def sampling(self, attempt: int) -> Sampling:
        """Return the sampling options of a try."""
        by, model = self._pieces.by, self._model
        first = by.temperature if model.temperature is None else model.temperature
        return Sampling(
            model.name,
            by.max_tokens if model.max_tokens is None else model.max_tokens,
            min(first + by.temperature_step * attempt, HIGHEST)
            if model.sends_temperature
            else None,
            # each grading and each try has a seed of its own, so that its request is sent again
            self._number * by.tries + attempt,
            model.length_field,
        )

    def _ask(
        self, generator: EndpointGenerator, rows: Sequence[Row], attempt: int, progress: Progress
    ) -> list[Row]:
        """Ask once about each row; return those whose reply holds no verdict."""
        left = []
        reminder = self._pieces.by.reminder if attempt else ""
        size = ROUND * self._model.endpoint.concurrency
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            requests = [
                self._pieces.template.request(self._pieces.values[row["id"]], reminder)
                for row in batch
            ]
            for row, reply in zip(batch, generator(requests), strict=True):
                self.replies[row["id"]] = reply
                if reply.problem or self._pieces.judging.verdict(row, reply.text) is not None:
                    progress.advance(1)
                else:
                    left.append(row)
        return left


def _record(
    item: Answered, pieces: _Pieces, gradings: Sequence[_Grading], model: JudgeModel
) -> dict[str, Any]:
    """Return an answer with its replies, and with the options of the judge."""
    row_id = item.row["id"]
    record: dict[str, Any] = {"id": row_id, "answer": item.answer}
    if row_id not in pieces.values:
        return record
    replies = [grading.replies[row_id] for grading in gradings]
    texts = [None if reply.problem else reply.text for reply in replies]
    record[REPLY] = texts if len(texts) > 1 else texts[0]
    record[JUDGE] = {
        "model": model.name,
        "prompt": pieces.prompt_name(item.row),
        "prompt_sha256": pieces.template.sha256(pieces.values[row_id]),
        "temperature": gradings[0].sampling(0).temperature,
        "max_tokens": gradings[0].sampling(0).max_new_tokens,
    }
    if problems := [*dict.fromkeys(reply.problem for reply in replies if reply.problem)]:
        record[JUDGE]["problems"] = problems
    return record
