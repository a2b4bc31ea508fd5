"""The report: self-contained, escaped, and true to the files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from markupsafe import Markup

from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.review.pair_view import word_diff
from realign.review.plots import BLUE, ORANGE, Difference, difference_plot
from realign.review.report import write_report
from realign.review.score_part import _marked_phrases


def test_word_diff_marks_the_words_that_differ() -> None:
    chosen, rejected = word_diff("There is a red house.", "There is a blue house.")
    assert chosen == Markup('There is a <mark class="kept">red</mark> house.')
    assert rejected == Markup('There is a <mark class="lost">blue</mark> house.')


def test_word_diff_escapes_model_text() -> None:
    chosen, rejected = word_diff("a <b>", "a <script>alert(1)</script>")
    assert "<script>" not in rejected
    assert "<b>" not in chosen


@pytest.fixture
def run(tmp_path: Path, records) -> Path:
    rows = records(10)
    rows[0] = dataclasses.replace(rows[0], rejected="<img src=x onerror=alert(1)>")
    write_parquet(rows, tmp_path / "run" / "dataset" / "dataset.parquet")
    funnel = {
        "rows": 12, "masked_by": {"rule": 12}, "accepted": 10, "accepted_by_rank": {"1": 7, "2": 3},
        "dropped": {"no candidate passed, mostly identical": 2}, "refused_candidates": {},
    }  # fmt: skip
    (tmp_path / "run" / "dataset" / "funnel.json").write_text(json.dumps(funnel))
    lines = [
        {"step": step, "loss": 1.4 - step / 10, "rewards/text_margins": step / 10,
         "rewards/image_margins": step / 20, "rewards/text_accuracies": 0.5}
        for step in range(1, 4)
    ]  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "run"


def test_the_report_is_one_file_without_external_references(run: Path) -> None:
    page = write_report(run, run / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", page)
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    assert "<script" not in page
    assert "onerror=alert(1)&gt;" in page


def test_the_report_shows_pairs_curves_and_counts(run: Path) -> None:
    page = write_report(run, run / "report.html").read_text()
    assert page.count('alt="original image"') == page.count('alt="retrieved image"') == 8
    for text in (
        "Reward margins",
        "Reward accuracies",
        "Loss",
        "pairs from 12 rows",
        "83.3 %",
        "mostly identical",
    ):
        assert text in page


@pytest.mark.parametrize(
    ("text", "phrases", "shown"),
    [
        ("A Cat, a catalogue.", ["cat"], 'A <mark class="absent">Cat</mark>, a catalogue.'),
        ("A hot dog, a dog.", ["hot dog"], 'A <mark class="absent">hot dog</mark>, a dog.'),
        ("Hot dogs.", ["dogs", "hot dogs"], '<mark class="absent">Hot dogs</mark>.'),
        ("一只狗。", ["狗"], '一只<mark class="absent">狗</mark>。'),
        ("<b> T.V.", ["t.v", ""], '&lt;b&gt; <mark class="absent">T.V</mark>.'),
        ("A cat.", [], "A cat."),
    ],
)
def test_words_for_absent_objects_are_marked(text: str, phrases: list[str], shown: str) -> None:
    assert _marked_phrases(text, phrases) == shown


def test_better_and_worse_are_told_apart_by_shape_and_number() -> None:
    plot = difference_plot(
        "aligned minus base",
        [
            Difference("recall", 4.0, 2.0, 6.0, "better", True),
            Difference("CHAIR_i", 1.5, 0.5, 2.5, "worse", False),
            Difference("<F1>", -0.04, -1.0, 1.0, "noise", True),
        ],
    )
    for text in ("recall: +4.0", "CHAIR_i (less is better): +1.5", "&lt;F1&gt;: -0.0"):
        assert f">{text}</text>" in str(plot).replace("−", "-")
    markers = set(
        re.findall(r'<use xlink:href="#(m[0-9a-f]+)" x="[^"]+" y="[^"]+" style="([^"]+)', str(plot))
    )
    shapes = {name for name, style in markers if f"stroke: {BLUE}" in style or ORANGE in style}
    assert len(shapes) == 2  # a triangle up and one down
    assert difference_plot("nothing", []) is None


def test_undefined_metrics_are_omitted_from_curves(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 1.5, "rewards/text_margins": NaN, "rewards/chosen": null}',
        '{"step": 2, "loss": Infinity, "rewards/text_margins": null}',
        '{"step": 3, "loss": NaN, "rewards/text_margins": null, "rewards/chosen": -Infinity}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">Loss</text>" in page  # of one point
    assert page.count("<svg") == 1
    (tmp_path / "metrics.jsonl").write_text("")
    assert "<svg" not in write_report(tmp_path, tmp_path / "report.html").read_text()


def test_a_funnel_without_accepted_pairs_is_reported(run: Path) -> None:
    funnel = json.loads((run / "dataset" / "funnel.json").read_text())
    funnel["accepted_by_rank"] = {}
    (run / "dataset" / "funnel.json").write_text(json.dumps(funnel))
    assert write_report(run, run / "report.html").is_file()


def test_equal_runs_give_equal_pages(run: Path) -> None:
    first = write_report(run, run / "a.html").read_bytes()
    assert write_report(run, run / "b.html").read_bytes() == first


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"must hold dataset/, metrics\.jsonl, eval/ or scores\.json"
    ):
        write_report(tmp_path, tmp_path / "report.html")
