"""Hub ids that cannot be had: one that the hub does not know, one that it keeps, and no hub at all
are told apart. The hub is a server on loopback.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from realign.building.similarity import load_similarity
from realign.errors import RefusedError
from realign.modeling.folder import resolve_model
from tests.ports import closed_port

# what the hub answers: status, its name of the error
ANSWERS = {
    "org/unknown": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/broken": (400, ""),
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        status, error = ANSWERS[name]
        self.send_response(status)
        body = json.dumps({"error": f"{name} is not for you"}).encode()
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_unknown_hub_id_is_refused_as_a_wrong_value(hub: str) -> None:
    with pytest.raises(
        RefusedError, match=r"^encoder must be a folder or a hub id, got 'org/unknown' \(.*404"
    ) as refused:
        resolve_model("org/unknown", "encoder")
    assert str(refused.value).endswith("). Check --encoder.")


def test_a_gated_hub_id_is_refused_with_how_to_get_access(hub: str) -> None:
    with pytest.raises(
        RefusedError, match=r"that may be downloaded, got 'org/gated' .* Ask for access on its page"
    ):
        resolve_model("org/gated")


@pytest.mark.parametrize("reason", ["closed", "offline", "failing"])
def test_an_unreachable_hub_is_not_reported_as_a_wrong_value(
    hub: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = {"closed": "ConnectError", "offline": "OfflineMode", "failing": "BadRequest"}[reason]
    with closed_port() as port:
        if reason == "closed":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        for option, resolve in (("similarity", load_similarity), ("model", resolve_model)):
            with pytest.raises(RefusedError) as refused:
                resolve("org/broken")
            start = f"{option} must be a folder or a hub id in the hub's local cache while the hub "
            start += f"cannot be reached, got 'org/broken', which is not there ({error}"
            assert str(refused.value).startswith(start)
            assert "Check" not in str(refused.value)
