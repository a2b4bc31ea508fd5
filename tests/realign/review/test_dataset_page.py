"""The page of a dataset: its numbers are the files', and no text of a dataset can act on it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from realign.building.run import build
from realign.data.dataset import read_records
from realign.data.decisions import Decision, append_decision
from realign.data.formats.parquet import write_parquet
from realign.demo.data import build_config, write_training_data
from realign.errors import RefusedError
from realign.review.dataset_page import MAX_PAIRS
from realign.review.page import spread
from realign.review.plots import compared_histogram, histogram
from realign.review.report import default_page, write_report


class Page(HTMLParser):
    """The cards' data, the cells of every table, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cards: list[dict[str, str]] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "article":
            self.cards.append(values)
        self.scripts += tag == "script"
        self.addresses += [v for k, v in values.items() if k in ("src", "href", "action")]
        assert not [name for name in values if name.startswith("on")], (tag, values)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data.strip()

    def counts(self) -> dict[str, int]:
        return {row[0]: int(row[2].replace(",", "")) for row in self.rows if row[2] != "count"}


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A dataset as the demo builds it."""
    folder = tmp_path_factory.mktemp("built")
    write_training_data(folder / "world", 16, 0)
    return build(build_config(folder / "world", folder / "run" / "dataset", 0)).parent


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "run" / "dataset"))


def test_the_numbers_of_the_page_equal_those_of_the_files(dataset: Path) -> None:
    outcomes = [
        json.loads(line)
        for path in (dataset / "shards").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    page = Page(write_report(dataset).read_text())
    tries = [attempt["reason"] for outcome in outcomes for attempt in outcome["refused"]]
    accepted = sum(not outcome["reason"] for outcome in outcomes)
    expected = {
        "in the source": len(outcomes),
        "masked by rule": sum(outcome["masked_by"] == "rule" for outcome in outcomes),
        "accepted": accepted,
        "tried": len(tries) + accepted,
    }
    expected |= {f"refused: {reason}": tries.count(reason) for reason in tries}
    reasons = [outcome["reason"] for outcome in outcomes if outcome["reason"]]
    expected |= {f"dropped: {reason}": reasons.count(reason) for reason in reasons}
    assert len(reasons) > 0
    assert page.counts() == expected
    records = read_records(dataset, None)
    assert [card["data-id"] for card in page.cards] == [record.id for record in records]
    tried = {outcome["id"]: {a["reason"] for a in outcome["refused"]} for outcome in outcomes}
    for card, record in zip(page.cards, records, strict=True):
        assert float(card["data-similarity"]) == record.meta["similarity"]["value"]
        assert float(card["data-cosine"]) == record.meta["retrieval"]["cosine"]
        assert int(card["data-rank"]) == record.meta["retrieval"]["rank"]
        assert int(card["data-words"]) == len(record.chosen.split())
        assert set(json.loads(card["data-reasons"])) == tried[record.id]
        assert card["data-decision"] == "none"


@pytest.mark.parametrize(("unsampled", "whole"), [(0, "source"), (70, "sample")])
def test_tiles_agree_with_the_table_of_the_rows(dataset: Path, unsampled: int, whole: str) -> None:
    funnel = json.loads((dataset / "funnel.json").read_text())
    accepted, masked = funnel["accepted"], funnel["rows"]
    (dataset / "funnel.json").write_text(
        json.dumps(funnel | {"rejected": {"image": 3}, "unsampled": unsampled})
    )
    text = write_report(dataset).read_text()
    table = {row[0]: row for row in reversed(Page(text).rows)}  # the first of two tables counts
    share = table["accepted"][3]
    assert table["in the source"][2] == str(masked + 3 + unsampled)
    assert f"<b>{accepted}</b><span>pairs from {masked + 3} rows of the {whole}</span>" in text
    assert f"<b>{share}</b><span>of the {whole}&#39;s rows gave a pair" in text
    assert f"{accepted} of {masked + 3}</span>" in text


def test_medians_are_shown_with_their_quartiles(tmp_path: Path, records) -> None:
    rows = [
        dataclasses.replace(record, meta={"similarity": {"value": number / 4}})
        for number, record in enumerate(records(5))
    ]
    write_parquet(rows, tmp_path / "pairs.parquet")
    text = " ".join(
        re.sub("<[^>]*>", " ", write_report(tmp_path / "pairs.parquet").read_text()).split()
    )
    assert "0.50 median similarity of the answers half of them from 0.25 to 0.75" in text


def test_the_page_is_one_file_without_external_resources(dataset: Path) -> None:
    page = write_report(dataset).read_text()
    assert all(address.startswith(("data:image/webp;", "#")) for address in Page(page).addresses)
    policy = html.unescape(re.findall(r'Security-Policy" content="([^"]+)"', page)[0])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert write_report(dataset, dataset / "again.html").read_text() == page


def test_model_text_is_escaped(tmp_path: Path, records) -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    rows = [
        dataclasses.replace(
            record,
            id=evil if number == 0 else record.id,
            rejected=evil,
            prompt=({"role": "system", "content": evil}, {"role": "user", "content": "?"}),
            meta={"masked": evil, "similarity": {"value": 0.5, "model": evil}},
        )
        for number, record in enumerate(records(3))
    ]
    data = tmp_path / "pairs.parquet"
    write_parquet(rows, data)
    note = Decision(evil, rows[0].key, "flag", evil)
    append_decision(tmp_path / "pairs.parquet.decisions.jsonl", note)
    page = Page(write_report(data).read_text())
    assert page.scripts == 1
    assert len(page.addresses) == 6
    assert page.cards[0]["data-id"] == evil


def test_similarities_of_refused_candidates_are_shown_if_recorded(dataset: Path) -> None:
    def labels() -> list[str]:
        page = write_report(dataset).read_text()
        return re.findall(r">(accepted|refused|threshold 0.95)</text>", page)

    assert labels() == ["accepted", "refused", "threshold 0.95", "accepted", "refused"]
    for path in (dataset / "shards").glob("*.jsonl"):
        outcomes = [json.loads(line) for line in path.read_text().splitlines()]
        for attempt in (attempt for outcome in outcomes for attempt in outcome["refused"]):
            for name in ("rank", "cosine", "similarity"):
                del attempt[name]  # as earlier builds left it
        path.write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
    assert labels() == ["accepted", "threshold 0.95"]


def test_decisions_are_counted_and_marked(dataset: Path) -> None:
    records = read_records(dataset, None)
    for index, decision in enumerate(("keep", "drop", "drop", "flag")):
        record = records[index]
        append_decision(
            dataset / "decisions.jsonl", Decision(record.id, record.key, decision, "why")
        )
    text = write_report(dataset).read_text()
    assert "decided: 1 keep, 2 drop, 1 flag" in text
    decisions = [card["data-decision"] for card in Page(text).cards]
    assert decisions[:5] == ["keep", "drop", "drop", "flag", "none"]
    assert text.count("drop: why") == 2


def test_a_large_dataset_is_sampled_with_a_note(tmp_path: Path, records) -> None:
    record = records(1)[0]
    many = (dataclasses.replace(record, id=str(n)) for n in range(1000))
    write_parquet(many, tmp_path / "dataset.parquet")
    text = write_report(tmp_path / "dataset.parquet").read_text()
    assert len(Page(text).cards) == MAX_PAIRS
    assert "Shown are 300 of 1,000 pairs" in " ".join(text.split())
    ids = [int(card["data-id"]) for card in Page(text).cards]
    assert ids[0] == 0
    assert {b - a for a, b in pairwise(ids)} == {3, 4}
    assert [spread(records(n), 8)[-1].id for n in (1, 8, 10, 15)] == ["r0", "r7", "r8", "r13"]


def test_thumbnails_are_small_and_unreadable_images_show_their_error(
    tmp_path: Path, records
) -> None:
    noise = Image.effect_noise((1500, 1000), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    rows = records(2)
    rows[0] = dataclasses.replace(rows[0], images=(buffer.getvalue(),), rejected_images=(b"GIF8",))
    write_parquet(rows, tmp_path / "pairs.parquet")
    text = write_report(tmp_path / "pairs.parquet").read_text()
    first, *_ = Page(text).addresses
    raw = base64.b64decode(first.partition(",")[2])
    assert len(raw) < 40_000
    with Image.open(io.BytesIO(raw)) as image:
        assert image.size == (264, 176)
    assert "row r0, rejected_images: image must be a readable JPEG, PNG, WEBP file" in text


def test_the_default_page_lies_beside_the_dataset(tmp_path: Path) -> None:
    for name in ("dataset.parquet", "pairs.parquet"):
        (tmp_path / name).touch()
    assert default_page(tmp_path) == tmp_path / "report.html"
    assert default_page(tmp_path / "dataset.parquet") == tmp_path / "report.html"
    assert default_page(tmp_path / "pairs.parquet") == tmp_path / "pairs.parquet.html"


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"id": 1, "reason": ""}', ""])
def test_a_damaged_shard_is_named(dataset: Path, line: str) -> None:
    path = dataset / "shards" / "00000.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(RefusedError, match=r"00000\.jsonl, line 1 must be an outcome"):
        write_report(dataset)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_parquet([], tmp_path / "none.parquet")
    with pytest.raises(RefusedError, match="must have at least one row"):
        write_report(tmp_path / "none.parquet")


def test_plots_of_a_single_value_are_drawn() -> None:
    assert "<svg" in histogram("x", {"accepted": [0.5], "refused": []}, "similarity")
    assert "<svg" in compared_histogram("x", {"chosen": [3], "rejected": [3]}, "words")
    assert "<svg" in compared_histogram("x", {"chosen": [0, 5000], "rejected": [1]}, "words")


def test_text_pairs_of_a_source_are_not_described_as_induced(tmp_path: Path, records) -> None:
    write_parquet(records(3), tmp_path / "pairs.parquet")
    text = " ".join(write_report(tmp_path / "pairs.parquet").read_text().split())
    assert "Chosen and rejected are the source's own answers" in text
    assert "refilled" not in text
