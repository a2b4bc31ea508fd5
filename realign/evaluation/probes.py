"""Properties of answers that a score does not show: their lengths, and the shares of answers that
are cut off, repeat themselves or say yes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from realign.evaluation.benchmark import Benchmark
from realign.generation.generator import Answer

WORDS_IN_SEQUENCE, TIMES = 4, 3


def probes(benchmark: Benchmark, answers: Sequence[Answer]) -> dict[str, Any]:
    """Describe a model's answers to the items of one task.

    Args:
        benchmark: Benchmark of the task. The first of its rules that reads yes and no is used.
        answers: One answer per item.
    Returns:
        ``mean_tokens`` (None where an answer's were not counted), ``mean_words``, ``share_empty``,
        ``share_cut`` (at the limit on their length), ``share_repeating`` (see :func:`repeats`), and
        ``yes_ratio`` with ``yes_rule``, the rule that reads it (both None for other benchmarks).

    Example::

        probes(POPE, [Answer("Yes."), Answer("No.")])["yes_ratio"]  # 0.5
    """
    counts = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    reading = next(((name, rule) for name, rule in benchmark.rules.items() if rule.says_yes), None)
    yes_ratio = None
    if reading:
        says_yes, prepare = reading[1].says_yes, reading[1].prepare
        assert says_yes is not None
        yes_ratio = fmean(says_yes(prepare(answer.text)) for answer in answers)
    return {
        "mean_tokens": fmean(counts) if len(counts) == len(answers) else None,
        "mean_words": fmean(len(answer.text.split()) for answer in answers),
        "share_empty": fmean(not answer.text.strip() for answer in answers),
        "share_cut": fmean(answer.is_cut for answer in answers),
        "share_repeating": fmean(repeats(answer.text) for answer in answers),
        "yes_ratio": yes_ratio,
        "yes_rule": reading[0] if reading else None,
    }


def repeats(text: str) -> bool:
    """Return whether an answer repeats itself: one sequence of four words occurs at least three
    times, whatever the case of the letters.
    """
    words = text.lower().split()
    sequences = Counter(zip(*(words[start:] for start in range(WORDS_IN_SEQUENCE)), strict=False))
    return max(sequences.values(), default=0) >= TIMES
