"""A build whose models are behind a server: every role is served, and each question asked once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from realign.building.models import ServedModel
from realign.building.prompts import COMPLETION_PROMPT, MASK_PROMPT
from realign.building.run import build
from realign.config import BuildConfig, CheckConfig, GeneratorSection
from realign.data.dataset import read_records
from realign.data.decisions import Decision, append_decision, decisions_path
from realign.demo.data import build_config, write_training_data
from realign.errors import RefusedError
from realign.review.check import check
from realign.review.report import write_report
from tests.ports import closed_port


class Server:
    """An OpenAI-compatible server of a model that answers, masks one word and fills it in."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.listed = 0  # how often its models were
        self.annotation = "There is a dog next to a blue house."
        self.has_room = True  # for completions
        self.fills = True  # a mask, instead of saying something else
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                parts = body["messages"][-1]["content"]
                if body["model"] != "scripted":
                    self._send(404, json.dumps({"error": {"message": "no such model"}}))
                    return
                text = next(part["text"] for part in parts if part["type"] == "text")
                image = next(part["image_url"]["url"] for part in parts if "image_url" in part)
                server.asked.append((text, image))
                answer = say(text, server.annotation)
                if COMPLETION_PROMPT in text and not server.fills:
                    answer = "Some kitten sleeps near its bowl."
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 1000, "completion_tokens": 5}
                reply = json.dumps({"id": "1", "choices": [choice], "usage": usage})
                is_refused = COMPLETION_PROMPT in text and not server.has_room
                if is_refused:
                    reply = json.dumps({"error": {"message": f"{len(server.asked)} tokens"}})
                self._send(400 if is_refused else 200, reply)

            def do_GET(self) -> None:
                server.listed += 1
                self._send(200, json.dumps({"data": [{"id": "scripted"}]}))

            def _send(self, status: int, reply: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def say(text: str, annotation: str) -> str:
    """Return the reply of the model."""
    if MASK_PROMPT in text:
        return text.rpartition("\n")[2].replace("dog", "[MASK]", 1)
    if COMPLETION_PROMPT in text:
        return text.rpartition("\n")[2].replace("[MASK]", "submarine")
    return annotation


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def config(tmp_path: Path, server: Server) -> BuildConfig:
    """Eight descriptions, the first without an answer."""
    write_training_data(tmp_path / "world", 8, seed=0)
    source = tmp_path / "world" / "train.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()][::2]
    for row in rows:
        row["answer"] = "A red dog and a cat."
    del rows[0]["answer"]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = GeneratorSection(model="scripted", endpoint=server.url)
    update = {"annotator": served, "masker": served, "inducer": served, "mask": "model"}
    return build_config(tmp_path / "world", tmp_path / "out", seed=0).model_copy(update=update)


def test_a_served_model_annotates_masks_and_completes(config: BuildConfig, server: Server) -> None:
    records = read_records(build(config), None)
    assert len(records) == 8
    assert records[0].chosen == "There is a dog next to a blue house."
    assert records[0].rejected == "There is a submarine next to a blue house."
    assert records[1].rejected == "A red submarine and a cat."
    provenance = {"engine": "endpoint", "model": "scripted", "decoding": "greedy", "seed": 0}
    assert records[0].meta["annotator"] == provenance
    assert "annotator" not in records[1].meta
    assert records[1].meta["masker"] == provenance
    assert records[1].meta["generator"] == provenance
    assert records[1].meta["masked_by"] == "model"
    funnel = json.loads((config.out / "funnel.json").read_text())
    assert (funnel["annotated"], funnel["accepted"], funnel["rejected"]) == (1, 8, {})
    assert len(server.asked) == len({*server.asked})


def test_a_continued_build_repeats_no_request(config: BuildConfig, server: Server) -> None:
    whole = build(config).read_bytes()
    server.asked.clear()
    for folder in ("annotated", "masked", "shards"):
        (config.out / folder / "00000.jsonl").unlink()
    (config.out / "dataset.parquet").unlink()
    assert build(config).read_bytes() == whole
    assert server.asked == []


def test_the_run_identity_includes_the_served_model_but_not_its_timeouts(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(config)
    assert config.inducer is not None
    patient = config.inducer.model_copy(update={"timeout_s": 9.0, "concurrency": 2})
    build(config.model_copy(update={"inducer": patient}))
    other = config.inducer.model_copy(update={"model": "another"})
    monkeypatch.setattr(ServedModel, "check_server", lambda _: None)
    with pytest.raises(RefusedError, match="stored scripted, requested another"):
        build(config.model_copy(update={"inducer": other}))


def test_rows_without_an_answer_need_an_annotator(config: BuildConfig) -> None:
    with pytest.raises(RefusedError, match=r"1 of 8 rows .*\n.*line 1: answer must not be empty"):
        build(config.model_copy(update={"annotator": None}))
    assert not (config.out / "build.json").exists()


def test_bad_rows_within_max_reject_are_left_out_of_a_served_build(
    config: BuildConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = {"annotator": None, "max_reject": 0.2}
    assert len(read_records(build(config.model_copy(update=allowed)), None)) == 7
    assert "1 of 8 source rows are bad and left out" in capsys.readouterr().err
    (line,) = (config.out / "rejected.jsonl").read_text().splitlines()
    problem = json.loads(line)
    assert (problem["field"], problem["code"]) == ("answer", "empty-answer")
    assert json.loads((config.out / "funnel.json").read_text())["rejected"] == {"empty-answer": 1}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I'm sorry, but I cannot see any image.", "no answer: refused to answer"),
        ("An <image> of a dog.", "no answer: special token"),
        ("", "no answer: empty"),
    ],
)
def test_a_reply_without_an_answer_does_not_become_the_chosen_answer(
    config: BuildConfig, server: Server, reply: str, reason: str
) -> None:
    server.annotation = reply
    assert len(read_records(build(config), None)) == 7
    assert json.loads((config.out / "funnel.json").read_text())["dropped"] == {reason: 1}


def test_requests_refused_by_the_server_are_counted_under_one_reason(
    config: BuildConfig, server: Server
) -> None:
    """The message differs by request, for example by its numbers of tokens."""
    server.has_room = False
    with pytest.raises(RefusedError, match="got none from 8 rows"):
        build(config.model_copy(update={"top_k": 1}))
    refused = json.loads((config.out / "funnel.json").read_text())["refused_candidates"]
    assert refused == {"refused by the server": 8}


def test_a_dry_run_prints_the_requests_per_server_and_writes_nothing(
    config: BuildConfig, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 8 rows lacks its answer; all are masked, at most twice, and refilled on 3 images."""
    dry = config.model_copy(update={"top_k": 3})
    assert build(dry, dry_run=True) == config.out / "dataset.parquet"
    assert not config.out.exists()
    assert (server.listed, len(server.asked)) == (1, 3)
    printed = capsys.readouterr().err
    assert "8 rows, 8 image files\n" in printed
    assert f"annotator scripted ({server.url}): 1 request\n" in printed
    assert f"masker scripted ({server.url}): 8 requests, up to 16 if it changes other" in printed
    assert f"inducer scripted ({server.url}): 8 requests, up to 24 if every retrieved" in printed
    # a server counts 1,000 tokens for text and image together, so often as it is asked
    assert "about 1,000 of prompts" in printed
    assert "about 8,000 to 24,000 of prompts" in printed
    assert re.search(r"8,000 to 16,000 of prompts \((\d+) of text and (\d+) of the image", printed)
    assert "about 5 of answers (5 each)" in printed  # where the row has none, as the server did
    assert "8 at a time, if each takes 0." in printed
    assert "Prices are not known" in printed


def test_the_build_does_not_repeat_the_requests_of_its_plan(
    config: BuildConfig, server: Server
) -> None:
    """The answers to the annotator's and the masker's questions are used by the build. The question
    to the inducer shows a row's own image, so the build does not ask it.
    """
    build(config)
    journals = [*(config.out / "journal").glob("*.jsonl")]
    lines = [line for path in journals for line in path.read_text().splitlines()]
    assert len(lines) == len(server.asked) == len({*server.asked}) > 1 + 8


def test_an_unreachable_server_is_refused_before_an_image_is_opened(
    config: BuildConfig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realign.building.source.inspect_corpus", lambda *_: pytest.fail("late"))
    with closed_port() as port:
        masker = GeneratorSection(model="scripted", endpoint=f"http://127.0.0.1:{port}/v1")
        message = rf"^build\.masker\.endpoint must be of a server .* got http://127.*:{port}/v1"
        with pytest.raises(RefusedError, match=message):
            build(config.model_copy(update={"masker": masker}))
    other = GeneratorSection(model="other", endpoint=server.url)
    with pytest.raises(
        RefusedError, match=r"^build\.inducer\.model must be .*\(scripted\), got other"
    ):
        build(config.model_copy(update={"inducer": other}))
    monkeypatch.setattr("realign.building.run.similarity_identity", lambda _: pytest.fail("late"))
    named = GeneratorSection(model="scripted", endpoint=server.url, api_key_env="UNSET_KEY")
    with pytest.raises(RefusedError, match=r"^build\.annotator\.api_key_env must .* got UNSET_KEY"):
        build(config.model_copy(update={"annotator": named}))
    assert not config.out.exists()


def test_a_finished_build_needs_no_server(config: BuildConfig, server: Server) -> None:
    whole = build(config).read_bytes()
    server.close()
    assert build(config).read_bytes() == whole
    first = read_records(config.out / "dataset.parquet", None)[0]
    append_decision(decisions_path(config.out), Decision(first.id, first.key, "drop"))
    assert len(read_records(build(config), None)) == 7


def test_rejected_answers_unrelated_to_the_chosen_ones_give_a_warning(
    config: BuildConfig, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset pages show the warning too; a model that fills masks gives none."""
    rows = [json.loads(line) for line in config.source.read_text().splitlines()] * 2
    lines = [json.dumps(row | {"id": str(number)}) for number, row in enumerate(rows)]
    config.source.write_text("\n".join(lines) + "\n")
    bad = config.model_copy(update={"keep_unmasked": False, "top_k": 1})
    good = bad.model_copy(update={"out": config.out / "good"})
    for build_one, is_warned in ((good, False), (bad, True)):
        server.fills = not is_warned
        build(build_one)
        page = write_report(build_one.out).read_text()
        notes = check(CheckConfig(data=build_one.out)).notes
        texts = (capsys.readouterr().err, page, "\n".join(notes))
        assert [("share next to nothing" in text) for text in texts] == [is_warned] * 3
