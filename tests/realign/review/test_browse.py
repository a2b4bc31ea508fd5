"""The local gallery: what it shows, what it writes, and whom it does not answer."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.testclient import TestClient

from realign.data.decisions import Decision, append_decision, read_decisions
from realign.data.formats.parquet import read_parquet, write_parquet
from realign.errors import RefusedError
from realign.review.browse.app import MAX_BODY, PAGE_SIZE, image_type, make_app
from realign.review.browse.rows import Query, Rows
from realign.review.browse.serve import serve

TOKEN = "the-token"
ORIGIN = "http://127.0.0.1:8770"


@pytest.fixture
def rows(tmp_path: Path, records) -> Rows:
    made = [
        dataclasses.replace(
            record,
            meta={
                "retrieval": {"rank": number % 3 + 1, "cosine": 0.9 + number / 1000},
                "similarity": {"value": number * 7 % 60 / 60, "model": "lexical"},
                "masked": "a [MASK]",
            },
        )
        for number, record in enumerate(records(60))
    ]
    made[0] = dataclasses.replace(
        made[0],
        id='"><script>alert(0)</script>',
        rejected="<script>alert(1)</script>",
        prompt=({"role": "user", "content": "<img src=x onerror=alert(2)>"},),
    )
    write_parquet(made, tmp_path / "dataset.parquet", row_group_bytes=60_000)
    path = tmp_path / "decisions.jsonl"
    return Rows(read_parquet(tmp_path / "dataset.parquet"), path, {"r1": ("identical",)})


@pytest.fixture
def stranger(rows: Rows) -> Iterator[TestClient]:
    """A client that was not given the address."""
    with TestClient(make_app(rows, "demo", TOKEN), base_url=ORIGIN) as client:
        yield client


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    answer = stranger.get(f"/?token={TOKEN}", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"  # the token leaves the address bar
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    return stranger


def decide(client: TestClient, number: int, decision: str, note: str = "", **headers: str):
    page = client.get("/", params={"start": number}).text
    key = re.search(rf'data-number="{number}" data-key="(\w+)"', page)
    assert key
    body = {"number": number, "key": key[1], "decision": decision, "note": note}
    return client.post("/decide", json=body, headers={"origin": ORIGIN} | headers)


def numbers(page: str) -> list[int]:
    return [int(number) for number in re.findall(r'<article [^>]*data-number="(\d+)"', page)]


def test_a_decision_is_stored_before_the_response_is_sent(client, rows: Rows, tmp_path) -> None:
    answer = decide(client, 3, "drop", "wrong \U0001f600")
    assert answer.json() == {"counts": {"undecided": 59, "keep": 0, "drop": 1, "flag": 0}}
    record = rows.record(3)
    assert read_decisions(tmp_path / "decisions.jsonl") == {
        ("r3", record.key): Decision("r3", record.key, "drop", "wrong \U0001f600")
    }
    decide(client, 3, "flag")
    decide(client, 4, "keep")
    assert rows.counts() == {"undecided": 58, "keep": 1, "drop": 0, "flag": 1}
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 3
    page = client.get("/?status=flag").text
    assert numbers(page) == [3]
    assert 'data-choice="flag" aria-pressed="true"' in page


def undo(client: TestClient, **headers: str):
    return client.post("/undo", json={}, headers={"origin": ORIGIN} | headers)


def test_decisions_are_undone_from_the_last_one_backwards(
    client, rows: Rows, tmp_path: Path
) -> None:
    decide(client, 3, "drop", "first")
    decide(client, 4, "keep")
    decide(client, 3, "flag", "second")
    counts = {"undecided": 58, "keep": 1, "drop": 1, "flag": 0}
    assert undo(client).json() == {
        "number": 3,
        "id": "r3",
        "undone": "flag",
        "decision": "drop",
        "note": "first",
        "counts": counts,
    }
    again = Rows(read_parquet(tmp_path / "dataset.parquet"), tmp_path / "decisions.jsonl")
    with TestClient(make_app(again, "demo", TOKEN), base_url=ORIGIN) as other:  # a new start
        other.get(f"/?token={TOKEN}")
        answer = undo(other).json()
        assert (answer["number"], answer["undone"], answer["decision"]) == (4, "keep", "undecided")
    assert (undo(client).json()["number"], rows.counts()["undecided"]) == (3, 60)
    nothing = undo(client)
    assert (nothing.status_code, nothing.text) == (409, "There is no decision to undo.")
    assert read_decisions(tmp_path / "decisions.jsonl") == {}


def test_undo_skips_decisions_about_other_rows(client, rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    decide(client, 3, "drop")
    elsewhere = [Decision("r3", "0" * 64, "keep"), Decision("gone", rows.record(3).key, "keep")]
    for decision in elsewhere:
        append_decision(path, decision)
    assert undo(client).json()["number"] == 3
    assert undo(client).status_code == 409
    assert [*read_decisions(path).values()] == elsewhere


def test_a_request_from_another_origin_cannot_undo(
    client, stranger: TestClient, tmp_path: Path
) -> None:
    decide(client, 3, "drop")
    assert undo(client, origin="http://evil.example").status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"origin": ORIGIN, "content-type": kind}
        assert client.post("/undo", content="{}", headers=headers).status_code == 415
    client.cookies.clear()
    assert undo(client).status_code == 403
    assert len(read_decisions(tmp_path / "decisions.jsonl")) == 1


def test_decisions_written_by_another_program_are_shown(client, rows: Rows, tmp_path: Path) -> None:
    record = rows.record(7)
    append_decision(tmp_path / "decisions.jsonl", Decision(record.id, record.key, "drop"))
    assert numbers(client.get("/?status=drop").text) == [7]
    append_decision(tmp_path / "decisions.jsonl", Decision("r8", record.key, "drop"))  # not r8's
    assert numbers(client.get("/?status=drop").text) == [7]


def test_a_decision_about_a_changed_row_is_refused(client, tmp_path: Path) -> None:
    body = {"number": 3, "key": "0" * 64, "decision": "drop"}
    answer = client.post("/decide", json=body, headers={"origin": ORIGIN})
    assert (answer.status_code, answer.text) == (
        409, "The row changed since the page was loaded. Reload it.",
    )  # fmt: skip
    assert not (tmp_path / "decisions.jsonl").exists()


def test_a_decision_file_that_is_damaged_or_cannot_be_written_is_reported(
    client, rows: Rows, tmp_path: Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    body = {"number": 3, "key": rows.record(3).key, "decision": "drop"}
    path.write_text("{}\n")
    for answer in (
        client.get("/"),
        client.post("/decide", json=body, headers={"origin": ORIGIN}),
    ):
        assert answer.status_code == 500
        assert "decisions.jsonl, line 1: id must be a text" in answer.text
    assert path.read_text() == "{}\n"
    path.unlink()
    path.mkdir()
    answer = client.post("/decide", json=body, headers={"origin": ORIGIN})
    assert (answer.status_code, "Is a directory" in answer.text) == (500, True)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("rank=2&least=0.9", [n for n in range(60) if n % 3 == 1 and n * 7 % 60 >= 54]),
        ("most=0.04", [n for n in range(60) if n * 7 % 60 / 60 <= 0.04]),
        ("reason=identical", [1]),
        ("find=r59", [59]),
        ("sort=-similarity&least=0.96", [17, 34]),
        (
            "sort=-index&rank=3&least=0.9",
            [n for n in range(59, -1, -1) if n % 3 == 2 and n * 7 % 60 >= 54],
        ),
        ("rank=99", []),
        ("sort=nothing&status=x&rank=x&least=nan&most=inf&start=-5", list(range(PAGE_SIZE))),
    ],
)
def test_filters_and_the_order_select_rows(client, query: str, expected: list[int]) -> None:
    assert numbers(client.get(f"/?{query}").text) == expected


def test_paging_reaches_every_row_once_while_rows_are_decided(client) -> None:
    seen: list[int] = []
    address = "/?status=undecided&sort=-similarity"
    while address:
        page = client.get(address).text
        seen += numbers(page)
        decide(client, seen[-1], "keep")  # leaves the filter; no other row may move
        found = re.search(r'rel="next" href="([^"]+)"', page)
        address = found[1].replace("&amp;", "&") if found else ""
    assert sorted(seen) == list(range(60))
    assert seen == sorted(seen, key=lambda n: -(n * 7 % 60))


def test_page_links_lead_to_the_previous_and_next_pages(rows: Rows) -> None:
    second = rows.page(Query(), 24, 24)
    assert (second.before, second.total, second.previous, second.next) == (24, 60, 0, 48)
    assert rows.page(Query(), 48, 24).next is None
    beyond = rows.page(Query(), 10**9, 24)
    assert (beyond.rows, beyond.previous) == ([], 36)


def test_model_text_is_escaped(client) -> None:
    page = client.get("/").text
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(0)&lt;/script&gt;" in page
    found = client.get('/?find="><script>alert(3)</script>').text
    assert "<script>alert" not in found
    assert 'value="&#34;&gt;&lt;script&gt;alert(3)&lt;/script&gt;"' in found
    decide(client, 2, "flag", '"><script>alert(4)</script>')
    assert "<script>alert" not in client.get("/").text


@pytest.mark.parametrize("path", ["/", "/style.css", "/image/0/original", "/thumbnail/0/original"])
def test_requests_without_the_token_are_refused(stranger: TestClient, path: str) -> None:
    for cookie in ("", "realign=wrong", "realign=th\u00e9"):
        answer = stranger.get(path, headers={"cookie": cookie.encode("latin-1")})
        assert (answer.status_code, "token included" in answer.text) == (403, True)
        assert "set-cookie" not in answer.headers
    assert stranger.get("/?token=wrong").status_code == 403
    body = {"number": 0, "key": "0" * 64, "decision": "drop"}
    assert stranger.post("/decide", json=body, headers={"origin": ORIGIN}).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8770", "127.0.0.1.evil.example", "0.0.0.0:8770", "["]
)
def test_requests_with_another_host_name_are_refused(client, host: str) -> None:
    for path in ("/", f"/?token={TOKEN}"):
        answer = client.get(path, headers={"host": host}, follow_redirects=False)
        assert answer.status_code == 421
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:8770"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_decisions_from_another_origin_are_refused(client, tmp_path: Path, headers) -> None:
    assert decide(client, 3, "drop", **headers).status_code == 403
    assert not (tmp_path / "decisions.jsonl").exists()


def test_a_post_without_an_origin_or_as_a_form_is_refused(client, rows: Rows) -> None:
    body = json.dumps({"number": 3, "key": rows.record(3).key, "decision": "drop"})
    assert client.post("/decide", content=body).status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"origin": ORIGIN, "content-type": kind}
        assert client.post("/decide", content=body, headers=headers).status_code == 415
    assert rows.counts()["undecided"] == 60


def test_images_are_not_served_to_other_sites(client) -> None:
    answer = client.get("/image/0/original", headers={"sec-fetch-site": "same-site"})
    assert answer.status_code == 403
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"number": true, "key": "a", "decision": "drop"}',
        b'{"number": -1, "key": "a", "decision": "drop"}',
        b'{"number": 60, "key": "a", "decision": "drop"}',
        b'{"number": 1, "key": 2, "decision": "drop"}',
        b'{"number": 1, "key": "a", "decision": "delete"}',
        b'{"number": 1, "key": "a", "decision": ["drop"]}',
        b'{"number": 1, "key": "a", "decision": "drop", "note": 5}',
        b'{"number": 1, "key": "a", "decision": "drop", "note": "\\ud800"}',
        b'{"number": 1, "key": "a", "decision": "drop", "note": "' + b"x" * 2001 + b'"}',
        b"[" * 16_000,
    ],
)
def test_bad_decisions_are_refused(client, tmp_path: Path, body: bytes) -> None:
    headers = {"origin": ORIGIN, "content-type": "application/json"}
    answer = client.post("/decide", content=body, headers=headers)
    assert answer.status_code == 400
    assert "one of keep, drop, flag" in answer.text
    big = client.post("/decide", content=b" " * (MAX_BODY + 1), headers=headers)
    assert big.status_code == 413
    assert not (tmp_path / "decisions.jsonl").exists()


@pytest.mark.parametrize(
    "path",
    [
        "/image/0/other",
        "/image/60/original",
        "/image/-1/original",
        "/image/0/../../etc/passwd",
        "/image/%2e%2e/original",
        "/../pyproject.toml",
        "/gallery.html.j2",
        "/thumbnail/99999999999999999999/original",
    ],
)
def test_unknown_paths_give_404(client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_images_have_their_own_type_and_thumbnails_are_small(client, rows: Rows) -> None:
    answer = client.get("/image/5/retrieved")
    assert answer.content == rows.record(5).rejected_images[0]
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    small = client.get("/thumbnail/5/original")
    assert small.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(small.content)) as image:
        assert max(image.size) <= 264


def test_bytes_that_are_not_an_image_are_not_served(tmp_path: Path, records) -> None:
    rows = [
        dataclasses.replace(record, images=(raw,))
        for record, raw in zip(
            records(3),
            (b"<html><script>alert(1)</script>", b"\x89PNG\r\n\x1a\n cut", b"<svg/>"),
            strict=True,
        )
    ]
    app = make_app(Rows(rows, tmp_path / "d.jsonl"), "demo", TOKEN)
    with TestClient(app, base_url=ORIGIN) as client:
        assert client.get(f"/?token={TOKEN}").status_code == 200
        assert [client.get(f"/image/{n}/original").status_code for n in range(3)] == [415, 200, 415]
        assert [client.get(f"/thumbnail/{n}/original").status_code for n in range(3)] == [415] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_type_of_an_image_is_found_from_its_content(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    known = kind in ("JPEG", "PNG", "WEBP")
    assert image_type(buffer.getvalue()) == (f"image/{kind.lower()}" if known else None)


def test_many_rows_are_browsed_without_their_images(tmp_path: Path, records, monkeypatch) -> None:
    record = records(1)[0]
    many = (dataclasses.replace(record, id=str(number)) for number in range(20_000))
    write_parquet(many, tmp_path / "dataset.parquet", row_group_bytes=1 << 20)
    source = read_parquet(tmp_path / "dataset.parquet")
    whole: list[int] = []
    read = type(source)._read
    monkeypatch.setattr(
        type(source),
        "_read",
        lambda self, i: (self is source and whole.append(i)) or read(self, i),
    )
    rows = Rows(source, tmp_path / "d.jsonl")
    with TestClient(make_app(rows, "demo", TOKEN), base_url=ORIGIN) as client:
        client.get(f"/?token={TOKEN}")
        whole.clear()
        assert numbers(client.get("/?sort=-index&start=5000").text)[0] == 14_999
    assert whole == list(range(14_999, 14_999 - PAGE_SIZE, -1))


def test_a_damaged_row_is_shown_with_its_problem(tmp_path: Path, records) -> None:
    path = tmp_path / "dataset.parquet"
    made = records(4)
    write_parquet(made, path)
    table = pq.read_table(path).to_pylist()
    table[1]["meta"] = "[bad"
    table[2]["images"] = [{"bytes": None, "path": "a.png"}]
    pq.write_table(pa.Table.from_pylist(table), path)
    for record in made[2:]:
        append_decision(tmp_path / "decisions.jsonl", Decision(record.id, record.key, "drop"))
    rows = Rows(read_parquet(path), tmp_path / "decisions.jsonl")
    assert rows.counts() == {"undecided": 3, "keep": 0, "drop": 1, "flag": 0}
    with TestClient(make_app(rows, "demo", TOKEN), base_url=ORIGIN) as client:
        page = client.get(f"/?token={TOKEN}").text
        assert numbers(page) == [0, 1, 2, 3]
        assert "dataset.parquet, row r1: meta must be a JSON object" in page
        assert "dataset.parquet, row r2: images must be embedded as bytes" in page
        assert numbers(client.get("/?find=r1").text) == [1]
        assert numbers(client.get("/?sort=words").text)[0] == 1
        body = {"number": 1, "key": made[1].key, "decision": "drop"}
        answer = client.post("/decide", json=body, headers={"origin": ORIGIN})
        assert (answer.status_code, "row r1" in answer.text) == (500, True)


def test_a_taken_port_and_missing_packages_are_refused(tmp_path: Path, records) -> None:
    import socket

    write_parquet(records(2), tmp_path / "dataset.parquet")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RefusedError, match=f"port {port} of 127.0.0.1 cannot be used"):
            serve(tmp_path, port=port)
    with pytest.raises(RefusedError, match=r"port must be in \[0, 65535\], got 70000"):
        serve(tmp_path, port=70000)
    with pytest.raises(RefusedError, match="decisions must be a file, got the folder"):
        serve(tmp_path, decisions=tmp_path)
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from realign.cli import app\n"
        f"app(['browse', {str(tmp_path)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs starlette. Install 'realign[pipeline,browse]'." in " ".join(result.stderr.split())
