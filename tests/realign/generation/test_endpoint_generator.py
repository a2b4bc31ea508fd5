"""The generator against a real HTTP server that fails on demand."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realign.errors import RefusedError
from realign.generation.endpoint import Endpoint
from realign.generation.endpoint_generator import Counts, EndpointGenerator, Sampling, image_url
from realign.generation.generator import Answer, Request
from tests.ports import closed_port
from tests.realign.generation.conftest import KEY

Ask = Callable[..., list[Request]]


@pytest.fixture
def generator(tmp_path: Path) -> Callable[..., EndpointGenerator]:
    """Generators with one journal, impatient unless told otherwise."""

    def make(url: str, **options: Any) -> EndpointGenerator:
        quick = {"timeout_s": 10.0, "backoff_s": 0.01, **options.pop("endpoint", {})}
        sampling = Sampling(**{"model": "m", "max_new_tokens": 16, **options})
        return EndpointGenerator(Endpoint(url, **quick), sampling, tmp_path / "journal.jsonl")

    return make


def test_the_request_has_the_documented_form(
    server: Any, generator: Any, ask_about: Ask, image: Path
) -> None:
    with generator(server.url, extra_body={"top_k": 5}) as generate:
        assert generate(ask_about("what?")) == [Answer("answer to what?")]
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what?"},
    ]
    assert server.bodies["what?"] == {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": 16,
        "temperature": 0.0,
        "seed": 0,
        "top_k": 5,
    }
    headers = server.headers[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["accept-encoding"] == "identity"
    about_us = {"os", "arch", "runtime", "runtime-version", "lang", "package-version"}
    assert not {f"x-stainless-{name}" for name in about_us} & headers.keys()


def test_options_unknown_to_a_server_can_be_omitted(
    server: Any, generator: Any, ask_about: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with generator(server.url, temperature=None, seed=None, length_field="max_tokens") as generate:
        generate(ask_about("p"))
    assert server.bodies["p"].keys() == {"model", "messages", "max_tokens"}
    assert server.bodies["p"]["max_tokens"] == 16
    assert "authorization" not in server.headers[0]


def test_a_request_without_an_image_is_sent_as_text(server: Any, generator: Any) -> None:
    with generator(server.url) as generate:
        assert generate([Request("p", None)]) == [Answer("answer to p")]
        assert generate([Request("p", None)]) == [Answer("answer to p")]
    (message,) = server.bodies["p"]["messages"]
    assert message == {"role": "user", "content": [{"type": "text", "text": "p"}]}
    assert server.asked == {"p": 1}


def test_no_request_is_sent_twice(
    server: Any, generator: Any, ask_about: Ask, image: Path, tmp_path: Path
) -> None:
    prompts = ["a", "b", "a", "c"]
    expected = [Answer(f"answer to {prompt}") for prompt in prompts]
    with generator(server.url) as generate:
        assert generate(ask_about(*prompts)) == expected
        assert generate.counts == Counts(
            asked=3, from_journal=1, prompt_tokens=30, completion_tokens=9
        )
        assert generate(ask_about("c", "d")) == [Answer("answer to c"), Answer("answer to d")]
        assert generate(()) == []
    # in another run, by another address and patience, with another file of the same image
    same = tmp_path / "same.png"
    same.write_bytes(image.read_bytes())
    other = server.url.replace("127.0.0.1", "localhost")
    with generator(other, endpoint={"concurrency": 2}) as generate:
        assert generate([Request(prompt, same) for prompt in prompts]) == expected
        assert generate.counts == Counts(from_journal=4)
    assert server.asked == {"a": 1, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"max_new_tokens": 17},
        {"temperature": 0.5},
        {"seed": 1},
        {"seed": None},
        {"extra_body": {"top_k": 1}},
    ],
)
def test_a_changed_option_sends_a_new_request(
    server: Any, generator: Any, ask_about: Ask, change: dict[str, Any]
) -> None:
    with generator(server.url) as generate:
        generate(ask_about("p"))
    with generator(server.url, **change) as generate:
        generate(ask_about("p"))
    assert server.asked["p"] == 2


def test_a_changed_image_sends_a_new_request(
    server: Any, generator: Any, ask_about: Ask, image: Path
) -> None:
    with generator(server.url) as generate:
        generate(ask_about("p"))
        image.write_bytes(image.read_bytes() + b"\0")
        generate(ask_about("p"))
    assert server.asked["p"] == 2


def test_the_journal_records_request_and_response(
    server: Any, generator: Any, ask_about: Ask, tmp_path: Path
) -> None:
    with generator(server.url) as generate:
        generate(ask_about("p"))
    entry = json.loads((tmp_path / "journal.jsonl").read_text())
    assert entry["request"]["prompt"] == "p"
    assert entry["request"]["model"] == "m"
    assert entry["request"]["image"] == "image.png"
    assert entry["status"] == 200
    assert entry["response"] == server.answer("p")


@pytest.mark.parametrize(
    "fault",
    [
        *("status|429", "status|500", "status|503", "status|408", "reset", "close_silently"),
        *("truncated", "cut_json", "page", "nested", "no_choices", "given_up", "huge", "huge|500"),
        *("bomb", "hang", "trickle", "trickle_head"),
    ],
)
def test_a_transient_failure_is_retried(
    server: Any, generator: Any, ask_about: Ask, fault: str
) -> None:
    server.fault = lambda prompt, attempt: fault if attempt < 2 else ""
    timeout_s = 0.5 if fault in ("hang", "trickle", "trickle_head") else 10.0
    started = time.monotonic()
    with generator(server.url, endpoint={"timeout_s": timeout_s}) as generate:
        assert generate(ask_about("p")) == [Answer("answer to p")]
        assert (generate.counts.asked, generate.counts.retries) == (1, 2)
    assert server.asked["p"] == 3
    assert time.monotonic() - started < 60  # a server that trickles is not waited for


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status|503", "with 503, status 503 for Bearer"),
        ("reset", "with ReadError"),
        ("truncated", "with RemoteProtocolError"),
        ("page", "with a response that is not JSON"),
        ("huge", "with a response that is more than 4000000 bytes"),
        ("huge|500", "with a response that is more than 4000000 bytes"),
        ("bomb", "with a response that is a compressed body"),
        ("trickle", r"with no answer within 0\.5 s"),
    ],
)
def test_a_permanent_failure_ends_the_run_and_keeps_the_answers(
    server: Any, generator: Any, ask_about: Ask, fault: str, reason: str
) -> None:
    server.fault = lambda prompt, attempt: fault if prompt == "bad" else ""
    options = {"timeout_s": 0.5, "max_retries": 1, "concurrency": 1}
    with (
        generator(server.url, endpoint=options) as generate,
        pytest.raises(RefusedError, match=f"{server.url} failed 2 times .* {reason}") as caught,
    ):
        generate(ask_about("a", "b", "bad", "c"))
    assert KEY not in str(caught.value)
    assert server.asked == {"a": 1, "b": 1, "bad": 2}
    server.fault = lambda prompt, attempt: ""
    with generator(server.url) as generate:
        generate(ask_about("a", "b", "bad", "c"))
        assert (generate.counts.asked, generate.counts.from_journal) == (2, 2)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("status|429", r"429, status 429 for Bearer \*\*\*"),
        ("close_silently", "[^.]* disconnected.*"),
    ],
)
def test_an_outage_is_announced_once(
    server: Any,
    generator: Any,
    ask_about: Ask,
    fault: str,
    failure: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.fault = lambda prompt, attempt: fault if attempt < 3 else ""
    with generator(server.url, endpoint={"backoff_s": 0.1}) as generate:
        generate(ask_about(*"abcd"))
        printed = capsys.readouterr().err
        server.fault = lambda prompt, attempt: "" if attempt else fault
        generate(ask_about("e"))
        assert capsys.readouterr().err == ""  # a server that fails now and then
        monkeypatch.setattr("realign.generation.endpoint_generator.ANNOUNCE_INTERVAL_S", 0.0)
        generate(ask_about("f"))
        assert capsys.readouterr().err.count("fails") == 1
    assert KEY not in printed
    assert re.fullmatch(
        rf"{server.url} fails: {failure}\. It is asked again in 1 s, and up to 6 times \(7 s of "
        r"waiting\) before the run stops\n",
        printed,
    ), printed


@pytest.mark.parametrize("is_date", [False, True])
def test_retry_after_is_honoured(
    server: Any, generator: Any, ask_about: Ask, is_date: bool
) -> None:
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=2)) if is_date else "1"
    server.fault = lambda prompt, attempt: "" if attempt else f"status|429|{after}"
    started = time.monotonic()
    with generator(server.url) as generate:
        generate(ask_about("p"))
    assert time.monotonic() - started > 0.9


def test_a_retry_after_of_an_hour_ends_the_run(server: Any, generator: Any, ask_about: Ask) -> None:
    server.fault = lambda prompt, attempt: "status|429|3600"
    with generator(server.url) as generate, pytest.raises(RefusedError, match="to wait 3600 s"):
        generate(ask_about("p"))
    assert server.asked["p"] == 1


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "with the key in the environment variable OPENAI_API_KEY. Set it to another key, or"),
        (403, "variable OPENAI_API_KEY. Set it to another key, or name another with api_key_env"),
        (404, r"Correct endpoint, which usually ends in /v1, or model\."),
        (405, "Correct endpoint"),
    ],
)
def test_a_server_that_refuses_everything_ends_the_run(
    server: Any, generator: Any, ask_about: Ask, status: int, remedy: str, tmp_path: Path
) -> None:
    server.fault = lambda prompt, attempt: f"status|{status}"
    with (
        generator(server.url) as generate,
        pytest.raises(RefusedError, match=f"{server.url} .* {status}.* {remedy}") as caught,
    ):
        generate(ask_about(*"abcdefghijklmnopqrst"))
    assert KEY not in str(caught.value)
    assert max(server.asked.values()) == 1
    assert len(server.asked) <= 8  # the requests under way
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_a_missing_api_key_is_refused_by_variable_name(
    server: Any, generator: Any, ask_about: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fault = lambda prompt, attempt: "status|401"
    monkeypatch.delenv("VLLM_KEY", raising=False)
    with (
        generator(server.url, endpoint={"api_key_env": "VLLM_KEY"}) as generate,
        pytest.raises(RefusedError, match="a key: the environment variable VLLM_KEY is not set"),
    ):
        generate(ask_about("p"))
    assert "authorization" not in server.headers[0]


def test_a_redirect_gets_no_key(
    server: Any, second_server: Any, generator: Any, ask_about: Ask
) -> None:
    server.fault = lambda prompt, attempt: f"redirect|{second_server.port}"
    with generator(server.url) as generate, pytest.raises(RefusedError, match="not followed"):
        generate(ask_about("p"))
    assert second_server.headers == []


def test_an_unreachable_server_is_named_at_once(generator: Any, ask_about: Ask) -> None:
    started = time.monotonic()
    with (
        closed_port() as port,
        generator(url := f"http://127.0.0.1:{port}/v1", endpoint={"backoff_s": 20.0}) as generate,
        pytest.raises(RefusedError, match=rf"got {url} \(ConnectError.*Start the server"),
    ):
        generate(ask_about("p"))
    assert time.monotonic() - started < 15  # less than one backoff


def test_a_server_that_goes_away_is_retried_until_it_returns(
    server: Any, generator: Any, ask_about: Ask
) -> None:
    with generator(server.url, endpoint={"backoff_s": 0.2}) as generate:
        generate(ask_about("a"))
        server.go_away(0.4)
        assert generate(ask_about("b")) == [Answer("answer to b")]
        assert generate.counts.retries >= 1
    assert server.asked == {"a": 1, "b": 1}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_request_does_not_fail_the_others(
    server: Any, generator: Any, ask_about: Ask, status: int, tmp_path: Path
) -> None:
    server.fault = lambda prompt, attempt: f"status|{status}" if prompt == "b" else ""
    for _ in range(2):
        with generator(server.url) as generate:
            first, second, third = generate(ask_about("a", "b", "c"))
        assert (first.text, third.text) == ("answer to a", "answer to c")
        assert second == Answer(
            "", problem=f"refused by the server: status {status} for Bearer ***"
        )
    assert server.asked == {"a": 1, "b": 1, "c": 1}
    assert KEY not in (tmp_path / "journal.jsonl").read_text()


def test_many_refused_requests_in_a_row_end_the_run(
    server: Any, generator: Any, ask_about: Ask, tmp_path: Path
) -> None:
    prompts = [str(number) for number in range(40)]
    server.fault = lambda prompt, attempt: "status|400"
    with (
        generator(server.url, endpoint={"concurrency": 1}) as generate,
        pytest.raises(RefusedError, match=r"has refused 16 requests in a row.*status 400"),
    ):
        generate(ask_about(*prompts))
    assert sum(server.asked.values()) == 16
    assert (tmp_path / "journal.jsonl").read_bytes() == b""  # none of them was at fault
    server.fault = lambda prompt, attempt: "status|400" if int(prompt) % 2 else ""
    with generator(server.url, endpoint={"concurrency": 1}) as generate:
        answers = generate(ask_about(*prompts))
        assert generate.counts.refused == 20
    assert [bool(answer.problem) for answer in answers] == [False, True] * 20


def test_concurrency_is_bounded_and_used(server: Any, generator: Any, ask_about: Ask) -> None:
    server.delay_s = 0.02
    with generator(server.url, endpoint={"concurrency": 5}) as generate:
        generate(ask_about(*map(str, range(30))))
    assert server.most_at_a_time == 5


def test_the_generator_works_inside_a_running_event_loop(
    server: Any, generator: Any, ask_about: Ask
) -> None:
    async def cell() -> list[Answer]:
        with generator(server.url) as generate:
            return list(generate(ask_about("p")))

    assert asyncio.run(cell()) == [Answer("answer to p")]


def test_an_image_too_large_to_send_fails_only_its_request(
    server: Any, generator: Any, ask_about: Ask, image: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    large = tmp_path / "large.png"
    noise = random.Random(0).randbytes(3 * 200 * 200)
    Image.frombytes("RGB", (200, 200), noise).save(large)
    monkeypatch.setattr(image_url, "__defaults__", (2000,))
    requests = [Request("a", image), Request("b", large), Request("c", image)]
    for asked in (2, 0):  # it is no line of the journal, and said again
        with generator(server.url) as generate:
            first, second, third = generate(requests)
            assert (generate.counts.asked, generate.counts.unsent) == (asked, 1)
        assert (first, third) == (Answer("answer to a"), Answer("answer to c"))
        assert second.text == ""
        assert "large.png: image must fit into 2000 bytes as JPEG" in second.problem
    assert "b" not in server.asked


def test_an_unreadable_image_ends_the_run(
    server: Any, generator: Any, ask_about: Ask, image: Path
) -> None:
    image.write_bytes(b"GIF89a")
    with (
        generator(server.url) as generate,
        pytest.raises(RefusedError, match=r"image\.png: image must be a readable"),
    ):
        generate(ask_about("p"))
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must be an http or https URL, got 'localhost:8000'"),
        ("file:///etc/passwd", "must be an http or https URL"),
        ("http://me:secret@host/v1", "a plain URL, got one of host with user"),
        ("http://host/v1?key=secret", "a plain URL, got one of host with user, query"),
    ],
)
def test_an_address_that_is_not_valid_is_refused(url: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        Endpoint(url)
    assert "secret" not in str(caught.value)


def test_an_invalid_api_key_is_refused_without_printing_it(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first\nsk-second")
    with pytest.raises(RefusedError, match="OPENAI_API_KEY must hold a key") as caught:
        generator("http://127.0.0.1:1/v1")
    assert "sk-" not in str(caught.value)


def test_a_trailing_line_end_is_not_part_of_the_key(
    server: Any, generator: Any, ask_about: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with generator(server.url) as generate:
        generate(ask_about("p"))
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name", ["messages", "stream", "n", "temperature", "max_tokens"])
def test_extra_body_fields_cannot_replace_standard_fields(name: str) -> None:
    with pytest.raises(RefusedError, match=f"extra_body must not hold '{name}'"):
        Sampling("m", 16, extra_body={name: 1})


def test_a_missing_client_is_named() -> None:
    code = "import sys; sys.modules['openai'] = None; import realign.generation.endpoint_generator"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Install 'realign[pipeline,endpoint]'." in result.stderr
