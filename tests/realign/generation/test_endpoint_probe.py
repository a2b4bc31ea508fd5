"""The probe of a server against servers of every kind: with and without a list of models, open and
with keys, busy, gone, and serving something else.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from realign.errors import RefusedError
from realign.generation.endpoint import Endpoint
from realign.generation.endpoint_probe import check_key, check_server
from tests.ports import closed_port
from tests.realign.generation.conftest import KEY

OPTION = "build.masker.endpoint"


class Models:
    """A server with a scripted list of models and a scripted answer to one question.

    Attributes:
        listed: Status of the list, and its models.
        reply: Status of an answer, and its body.
        key: What it asks for; none by default.
        asked: Method and path of every request.
    """

    def __init__(self) -> None:
        self.listed: tuple[int, list[str]] = (200, ["served"])
        self.reply: tuple[int, object] = (200, {"choices": []})
        self.key = ""
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(f"GET {self.path}")
                status, names = server.listed
                listed = {"object": "list", "data": [{"id": name} for name in names]}
                self._send(status, listed if status == 200 else {"error": {"message": "no list"}})

            def do_POST(self) -> None:
                server.asked.append(f"POST {self.path}")
                self.rfile.read(int(self.headers["Content-Length"]))
                self._send(*server.reply)

            def _send(self, status: int, body: object) -> None:
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    message = f"bad key {self.headers.get('Authorization')}"
                    status, body = 401, {"error": {"message": message}}
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = Thread(target=self._http.serve_forever)
        self._thread.start()

    def check(self, model: str = "served") -> None:
        check_server(Endpoint(self.url, option=OPTION), model)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    models = Models()
    yield models
    models.close()


def test_a_listed_model_is_accepted_without_a_completion_request(server: Models) -> None:
    server.check()
    assert server.asked == ["GET /v1/models"]


@pytest.mark.parametrize("status", [403, 404, 405, 500, 501, 503])
def test_a_server_without_a_model_list_gets_one_completion_request(
    server: Models, status: int
) -> None:
    server.listed = (status, [])
    server.check()
    assert server.asked == ["GET /v1/models", "POST /v1/chat/completions"]


def test_an_unlisted_model_that_answers_is_accepted(server: Models) -> None:
    server.check("an-alias")
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 404])
def test_an_unserved_model_is_refused_with_the_served_ones(server: Models, status: int) -> None:
    server.listed, server.reply = (200, ["a", "b"]), (status, {"error": {"message": "no model c"}})
    with pytest.raises(RefusedError) as refused:
        server.check("c")
    assert str(refused.value) == (
        f"build.masker.model must be a model that {server.url} serves (a, b), got c ({status}, no "
        "model c). Correct build.masker.model, or serve it."
    )


def test_an_address_without_the_completions_api_is_refused(server: Models) -> None:
    server.listed, server.reply = (404, []), (404, {"detail": "Not Found"})
    with pytest.raises(
        RefusedError, match=r"404, Not Found\. Correct build\.masker\.endpoint, which usually ends "
    ):
        server.check()


def test_a_web_page_in_place_of_an_answer_is_refused(server: Models) -> None:
    server.listed, server.reply = (404, []), (200, "<html>")
    with pytest.raises(RefusedError, match=r"page\. Correct build\.masker\.endpoint, which"):
        server.check()


@pytest.mark.parametrize("status", [200, 400, 429, 500, 503])
def test_a_server_that_is_busy_or_refuses_the_request_passes_the_probe(
    server: Models, status: int
) -> None:
    server.listed, server.reply = (404, []), (status, {"error": {"message": "not now"}})
    server.check()


def test_missing_and_wrong_api_keys_give_different_messages(
    server: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    with pytest.raises(RefusedError) as refused:
        server.check()
    assert str(refused.value) == (
        f"{OPTION} {server.url} refuses every request with 401, bad key None, without a key: the "
        "environment variable OPENAI_API_KEY is not set. Set it, or name another with "
        "build.masker.api_key_env."
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    with pytest.raises(RefusedError) as refused:
        server.check()
    assert str(refused.value) == (
        f"{OPTION} {server.url} refuses every request with 401, bad key Bearer ***, with the key "
        "in the environment variable OPENAI_API_KEY. Set it to another key, or name another with "
        "build.masker.api_key_env."
    )
    assert server.asked == ["GET /v1/models"] * 2
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.check()


def test_an_api_key_without_permission_is_refused(server: Models) -> None:
    server.listed, server.reply = (403, []), (403, {"error": {"message": "no scope"}})
    with pytest.raises(RefusedError, match=r"403, no scope, without a key: .* OPENAI_API_KEY is"):
        server.check()


def test_an_unreachable_server_is_refused_with_the_option_name() -> None:
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(RefusedError) as refused:
            check_server(Endpoint(url, option=OPTION), "served")
    assert str(refused.value).startswith(
        f"{OPTION} must be of a server that can be reached, got {url} (ConnectError: "
    )
    assert str(refused.value).endswith(f"Start the server, check the network, or correct {OPTION}.")


def test_a_server_that_accepts_connections_without_replying_passes_the_probe() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        check_server(Endpoint(url, timeout_s=0.2, option=OPTION), "served")


def test_a_required_api_key_is_checked_before_any_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("MY_KEY", raising=False)
    openai = Endpoint("https://api.openai.com/v1", option=OPTION)
    with pytest.raises(
        RefusedError,
        match=r"^build\.masker\.api_key_env must name .* https://api\.openai\.com/v1, got "
        r"OPENAI_API_KEY, which is not set\. Set it, or name another one with build\.masker\.api_",
    ):
        check_key(openai)
    local = Endpoint("http://127.0.0.1:8000/v1", "MY_KEY", option=OPTION)
    check_key(local)
    with pytest.raises(RefusedError, match=r"got MY_KEY, which is not set\. Set it, or drop build"):
        check_key(local, is_named=True)
    monkeypatch.setenv("MY_KEY", KEY)
    check_key(local, is_named=True)
