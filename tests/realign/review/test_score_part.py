"""The evaluation on a run's page: differences, gained and lost answers, constant answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realign.review.report import write_report


def entry(value: float | None, change: dict[str, Any] | None = None) -> dict[str, Any]:
    """An entry of scores.json; ``change`` is its comparison with the first model."""
    found = {
        "value": value,
        "interval": None if value is None else [value - 0.05, value + 0.05],
        "undefined_draws": 0,
        "difference": 0.0,
        "difference_interval": None,
        "paired": None,
    }
    return found | (change or {})


def paired(gained: int | None, lost: int | None, detectable: float | None) -> dict[str, Any]:
    return {"gained": gained, "lost": lost, "units": 100, "minimum_detectable": detectable}


def difference(value: float, low: float, high: float, found: dict[str, Any]) -> dict[str, Any]:
    return {"difference": value, "difference_interval": [low, high], "paired": found}


def row(metric: str, label: str, test: dict[str, Any], *, more: bool = True) -> dict[str, Any]:
    return {
        "benchmark": "pope",
        "title": "POPE",
        "rule": "official",
        "split": "random",
        "metric": metric,
        "task": "pope_random",
        "label": label,
        "more_is_better": more,
        "is_headline": more,
        "scale": 100,
        "undefined": "there was nothing to count",
        "comparisons": {"aligned": test},
    }


def answers(base: tuple[str, bool], aligned: tuple[str, bool], *words: str) -> dict[str, Any]:
    return {
        name: {"text": text, "is_right": is_right, "absent_words": list(words)}
        for name, (text, is_right) in (("base", base), ("aligned", aligned))
    }


@pytest.fixture
def scores() -> dict[str, Any]:
    """Scores of two models: an accuracy that grew, an F1 inside the noise, errors that grew."""
    models = {
        "base": {
            "accuracy": entry(0.5),
            "f1": entry(0.6),
            "errors": entry(0.1),
            "said_yes": entry(0.81),
            "tp": entry(40.0),
        },
        "aligned": {
            "accuracy": entry(0.7, difference(0.2, 0.1, 0.3, paired(30, 10, 0.12))),
            "f1": entry(0.61, difference(0.01, -0.02, 0.04, paired(None, None, None))),
            "errors": entry(0.2, difference(0.1, 0.05, 0.15, paired(None, None, 0.03))),
            "said_yes": entry(0.52, difference(-0.29, -0.4, -0.2, paired(None, None, None))),
            "tp": entry(36.0),
        },
    }
    constants = {
        "yes": {"accuracy": 0.5, "f1": 0.667, "errors": 0.5, "said_yes": 1.0, "tp": 50.0},
        "no": {"accuracy": 0.5, "f1": None, "errors": 0.5, "said_yes": 0.0, "tp": 0.0},
    }
    clear = {"p_holm": 0.0004, "is_inside_noise": False}
    split = {"items": 100, "images": 40, "models": models, "constants": constants}
    return {
        "schema": 3,
        "baseline": "base",
        "models": ["base", "aligned"],
        "draws": {"bootstrap": 2000, "permutation": 2000, "seed": 7},
        "confidence": 0.95,
        "num_comparisons": 3,
        "benchmarks": {
            "pope": {
                "title": "POPE",
                "cluster": "image",
                "clusters": 40,
                "version": "old",
                "rules": {
                    "official": {
                        "unit": "fraction",
                        "note": "No is a word.",
                        "splits": {"random": split},
                    }
                },
            }
        },
        "table": [
            row("accuracy", "POPE, accuracy", clear),
            row("f1", "POPE, F1", {"p_holm": 0.62, "is_inside_noise": True}),
            row("errors", "POPE, errors", clear, more=False),
        ],
        "tasks": {
            "pope_random": {
                "benchmark": "pope",
                "items": 100,
                "images": 40,
                "cut": {"base": 3, "aligned": 0},
                "probes": {
                    "base": {
                        "mean_words": 7.25,
                        "share_cut": 0.03,
                        "share_repeating": 0.25,
                        "yes_ratio": 0.81,
                    },
                    "aligned": {
                        "mean_words": 3.5,
                        "share_cut": 0.0,
                        "share_repeating": 0.0,
                        "yes_ratio": 0.52,
                    },
                },
            }
        },
        "samples": [
            {
                "task": "pope_random",
                "change": change,
                "change_count": count,
                "image": "a.png",
                "picture": "0.png",
                "prompt": "Is there a <dog>?",
                "truth": "right answer: no",
                "answers": model_answers,
            }
            for change, count, model_answers in (
                ("gained", 30, answers(("Yes, a <b>.", False), ("No.", True))),
                ("lost", 10, answers(("A cat.", True), ("A cat and a dog.", False), "dog")),
            )
        ],
    }


def page_of(scores: dict[str, Any], folder: Path) -> str:
    (folder / "eval" / "samples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "eval" / "samples" / "0.png")
    (folder / "eval" / "scores.json").write_text(json.dumps(scores))
    return write_report(folder, folder / "report.html").read_text(encoding="utf-8")


def lines(page: str) -> list[str]:
    """The text of each row of the tables of comparisons and of all others."""
    found = re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL)
    return [" ".join(re.sub("<[^>]*>", " ", each).split()) for each in found]


def test_a_score_row_shows_the_difference_and_its_verdict(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    shown = lines(page_of(scores, tmp_path))
    assert shown[1:3] == [
        "POPE, accuracy rule official, 100 questions on 40 images; more is better; all yes 50.0, "
        "all no 50.0 base 50.0 45.0 to 55.0 ⚠ answering yes to everything is no worse",
        "aligned 70.0 65.0 to 75.0 +20.0 [+10.0, +30.0] ▲ better +30 −10 of 100 below 0.001 12.0",
    ]
    assert "≈ inside the noise +30 −10 of 100 0.620" in shown[4]  # F1 counts no questions itself
    assert "⚠ answering yes to everything is no worse" in shown[4]
    assert "less is better" in shown[5]
    assert "▼ worse" in shown[6]


def tiles(page: str) -> list[str]:
    """The text of each tile."""
    found = re.findall(r'<div class="card tile">.*?</div>', page, flags=re.DOTALL)
    return [" ".join(re.sub("<[^>]*>", " ", each).split()) for each in found]


def test_headline_scores_have_intervals(scores: dict[str, Any], tmp_path: Path) -> None:
    shown = tiles(page_of(scores, tmp_path))
    assert shown == [
        "50.0 → 70.0 POPE, accuracy, base → aligned 95 %: 45.0 to 55.0 → 65.0 to 75.0; "
        "difference +20.0 [+10.0, +30.0] ▲ better",
        "60.0 → 61.0 POPE, F1, base → aligned 95 %: 55.0 to 65.0 → 56.0 to 66.0; "
        "difference +1.0 [-2.0, +4.0] ≈ inside the noise",
    ]


def test_every_model_has_a_line_below_its_metric(scores: dict[str, Any], tmp_path: Path) -> None:
    names = ("DPO", "SFT")
    split = scores["benchmarks"]["pope"]["rules"]["official"]["splits"]["random"]
    for name in names:
        split["models"][name] = split["models"]["aligned"]
        scores["tasks"]["pope_random"]["cut"][name] = 0
        probes = scores["tasks"]["pope_random"]["probes"]
        probes[name] = probes["aligned"]
    scores["models"] += names
    page = page_of(scores, tmp_path)
    assert [line.split()[0] for line in lines(page)[2:5]] == ["aligned", *names]
    assert page.count('rowspan="4"') == 3


def test_every_split_and_metric_is_shown_in_its_unit(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(scores, tmp_path)
    shown = lines(page)
    assert "random 100 tp 40 36 yes 50, no 0" in shown
    assert "random 100 said yes 81.0 52.0 -29.0 [-40.0, -20.0] yes 100.0, no 0.0" in shown
    assert "All splits and metrics, rule official, in percent" in page
    assert "No is a word." in page
    assert (
        "100 questions on 40 images, data version old, intervals over 40 clusters (image)" in page
    )
    assert "2,000 draws of a paired bootstrap (seed 7)" in page
    scores["benchmarks"]["pope"]["rules"]["official"]["unit"] = "percent"
    assert "random 100 accuracy 0.5 0.7 +0.2 [+0.1, +0.3] yes 0.5, no 0.5" in lines(
        page_of(scores, tmp_path)
    )


def test_answer_length_truncation_repetition_and_yes_rate_are_shown(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    shown = lines(page_of(scores, tmp_path))
    assert "questions number model words cut, % repeating, % says yes, %" in shown
    assert "pope_random 100 base 7.2 3.0 25.0 81.0" in shown
    assert "pope_random 100 aligned 3.5 0.0 0.0 52.0" in shown


def test_unjudged_answers_are_shown_with_their_probes_only(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    probes = {model: {"mean_words": 9.0} for model in scores["models"]}
    scores["tasks"]["mmhal"] = {**scores["tasks"]["pope_random"], "benchmark": "mmhal"}
    scores["tasks"]["mmhal"]["probes"] = probes
    assert "mmhal 100 base 9.0 — — —" in lines(page_of(scores, tmp_path))


def test_gained_and_lost_answers_are_shown_with_the_right_model(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    page = page_of(scores, tmp_path)
    gained, lost = page.index("Gained: wrong before"), page.index("Lost: right before")
    assert gained < lost
    assert "pope_random: 30 in all" in page[gained:lost]
    first = page[gained:lost]
    assert "Yes, a &lt;b&gt;." in first
    assert "Is there a &lt;dog&gt;?" in first
    assert first.index("base: ✗ wrong") < first.index("aligned: ✓ right")
    assert 'A cat and a <mark class="absent">dog</mark>.' in page[lost:]
    # marked by who is right, not by who was first
    looks = re.findall(r'<p class="answer (\w+)"><span class="label">(\w+): (.)', page)
    assert looks == [
        ("rejected", "base", "✗"),
        ("chosen", "aligned", "✓"),
        ("chosen", "base", "✓"),
        ("rejected", "aligned", "✗"),
    ]
    assert 'src="data:image/webp;base64,' in page[lost:]


def test_a_single_model_is_shown_without_comparisons(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    scores["models"] = ["base"]
    split = scores["benchmarks"]["pope"]["rules"]["official"]["splits"]["random"]
    del split["models"]["aligned"]
    del scores["tasks"]["pope_random"]["cut"]["aligned"]
    scores |= {"num_comparisons": 0, "samples": []}
    for each in scores["table"]:
        each["comparisons"] = {}
    page = page_of(scores, tmp_path)
    assert "difference" not in lines(page)[0]
    assert tiles(page) == [
        "50.0 POPE, accuracy, base 95 %: 45.0 to 55.0",
        "60.0 POPE, F1, base 95 %: 55.0 to 65.0",
    ]
    assert "aligned" not in page
    assert "Answers gained and lost" not in page


def test_undefined_scores_are_shown_as_a_dash_with_the_reason(
    scores: dict[str, Any], tmp_path: Path
) -> None:
    split = scores["benchmarks"]["pope"]["rules"]["official"]["splits"]["random"]
    undefined = {"difference": None, "paired": paired(None, None, None)}
    split["models"]["aligned"]["f1"] = entry(None, undefined)
    scores["table"][1]["comparisons"] = {}
    page = page_of(scores, tmp_path)
    assert "aligned — there was nothing to count — " in lines(page)[4]
    assert "60.0 → — POPE, F1" in tiles(page)[1]
    assert "95 %: 55.0 to 65.0 → —;" in tiles(page)[1]
