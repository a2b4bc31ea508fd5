"""Our rules of lmms-eval's name against the scorers of an installed lmms-eval.

They run where lmms_eval is importable, which is never the case in this project's own environment:
CONTRIBUTING.md says how.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.tasks.hallusion_bench import evaluate_hb  # type: ignore[import-not-found]
from lmms_eval.tasks.hallusion_bench import utils as hallusion_utils
from lmms_eval.tasks.mme import utils as mme_utils
from lmms_eval.tasks.pope import utils as pope_utils
from lmms_eval.tasks.scienceqa import utils as scienceqa_utils
from lmms_eval.tasks.textvqa import utils as textvqa_utils

from realign.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from realign.evaluation.benchmarks.mme import MME
from realign.evaluation.benchmarks.pope import POPE
from realign.evaluation.benchmarks.scienceqa import SCIENCEQA
from realign.evaluation.benchmarks.textvqa import TEXTVQA

PIECES = (
    *("yes", "Yes", "YES", "no", "No", "NO", "n", "Y", "A", "a", "B", "b", "C", "not", "None"),
    *("the answer is", "dog", "two", "2", "10:30", "1,000", "it's", "", "a cat", "unanswerable"),
)
JOINS = (" ", ". ", ", ", ".", "\n", ") ", "! ", "? ")


def answers(count: int) -> list[str]:
    """Answers of one to four pieces, from a fixed seed."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        text = rng.choice(PIECES)
        for _ in range(rng.randrange(4)):
            text += rng.choice(JOINS) + rng.choice(PIECES)
        made.append(rng.choice((text, f" {text}", f"{text}.", f"{text} ")))
    return made


ANSWERS = [*dict.fromkeys(answers(4000))]


def sums(rule: Any, pairs: list[tuple[Any, str]]) -> Any:
    return np.sum([rule.score(row, rule.prepare(answer)) for row, answer in pairs], axis=0)


def test_pope_is_scored_as_by_lmms_eval() -> None:
    rule, metrics = POPE.rules["lmms-eval"], ("accuracy", "precision", "recall", "f1_score")
    for seed in range(200):  # of 20 answers, so that metrics are often not defined
        rng = random.Random(seed)
        pairs = [({"label": rng.choice(("yes", "no"))}, text) for text in rng.sample(ANSWERS, 20)]
        results = [
            pope_utils.pope_process_results({"answer": row["label"], "question_id": 0}, [answer])
            for row, answer in pairs
        ]
        with np.errstate(invalid="ignore"):
            ours = rule.metrics(sums(rule, pairs))
        for metric in (*metrics, "yes_ratio"):
            name = f"pope_{metric}"
            theirs = getattr(pope_utils, f"pope_aggregate_{metric}")([r[name] for r in results])
            assert ours[metric.removesuffix("_score")] == pytest.approx(theirs, abs=1e-12)


def test_mme_is_scored_as_by_lmms_eval() -> None:
    rule = MME.rules["lmms-eval"]
    pairs = [
        ({"task": "count", "image": f"{i // 2}", "label": ("yes", "no")[i % 2]}, text)
        for i, text in enumerate(ANSWERS)
    ]
    results = [
        mme_utils.mme_process_results(
            {"answer": row["label"], "category": "count", "question_id": row["image"]}, [answer]
        )["mme_perception_score"]
        for row, answer in pairs
    ]
    scored = [(row, rule.score(row, rule.prepare(answer))) for row, answer in pairs]
    for (_, ours), theirs in zip(scored, results, strict=True):
        assert ours[0] == theirs["score"]
    images = [rule.combine(scored[i : i + 2]) for i in range(0, len(scored), 2)]
    metrics = rule.metrics(np.sum(images, axis=0))
    assert metrics["score"] == pytest.approx(mme_utils.mme_aggregate_results(results))


def test_scienceqa_is_scored_as_by_lmms_eval() -> None:
    rule = SCIENCEQA.rules["lmms-eval"]
    for label in "ABC":
        row = {"label": label, "has_image": True}
        document = {"choices": ["x", "y", "z"], "answer": "ABC".index(label)}
        for answer in ANSWERS:
            theirs = scienceqa_utils.sqa_process_results(document, [answer])["exact_match"]
            assert rule.score(row, rule.prepare(answer))[1] == theirs, answer


def test_textvqa_and_vizwiz_are_scored_as_by_lmms_eval() -> None:
    rule = TEXTVQA.rules["lmms-eval"]
    rng = random.Random(1)
    for answer in ANSWERS:
        people = tuple(
            rng.choice((answer, answer.lower(), *rng.sample(ANSWERS, 2))) for _ in range(10)
        )
        document = {"question_id": 0, "answers": list(people)}
        theirs = textvqa_utils.textvqa_process_results(document, [answer])["exact_match"]
        ours = rule.score({"references": people}, rule.prepare(answer))[1]
        assert ours == pytest.approx(theirs, abs=1e-12), (answer, people)


def test_hallusionbench_is_scored_as_by_lmms_eval() -> None:
    rng = random.Random(2)
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    rows = [
        {
            **dict(zip(keys, ("VD", "map", str(s), str(f), str(q)), strict=True)),
            "id": f"VD_map_{s}_{f}_{q}",
            "set": f"VD_map_{s}",
            "visual_input": "1" if f == 0 else "2",
            "may_be_unclear": False,
            "gt_answer": str(rng.randrange(2)),
        }
        for s in range(100)
        for f in range(2)
        for q in range(3)
    ]
    names = {"aAcc": "aacc", "fAcc": "facc", "qAcc": "qacc"}
    texts = rng.choices(ANSWERS, k=len(rows))
    results = [row | {"model_prediction": text} for row, text in zip(rows, texts, strict=True)]
    ours = _hallusion_metrics("lmms-eval-intern", rows, texts)
    for metric, name in names.items():
        theirs = evaluate_hb.hb_aggregation_result_intern(results, metric)
        assert ours[name] == pytest.approx(100 * theirs, abs=1e-4)
    verdicts = rng.choices("012", weights=(1, 6, 1), k=len(rows))
    judged = hallusion_utils.assign_correctness(
        [row | {"check": verdict} for row, verdict in zip(rows, verdicts, strict=True)], "check"
    )
    ours = _hallusion_metrics("lmms-eval", rows, verdicts)
    for name, found in (
        ("aacc", hallusion_utils.get_eval_all(judged, "check")),
        ("facc", hallusion_utils.get_eval_fig(judged)),
        ("qacc", hallusion_utils.get_eval_pair_all(judged, "check")),
    ):
        assert ours[name] == pytest.approx(100 * found["correct"] / found["total"], abs=1e-4)


def _hallusion_metrics(name: str, rows: list[dict[str, Any]], texts: list[str]) -> Any:
    rule = HALLUSIONBENCH.rules[name]
    sets: dict[str, list[Any]] = {}
    for row, text in zip(rows, texts, strict=True):
        sets.setdefault(row["set"], []).append((row, rule.score(row, text)))
    return rule.metrics(np.sum([rule.combine(each) for each in sets.values()], axis=0))
