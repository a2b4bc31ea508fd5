"""A chat completion server on loopback that fails in every way a test asks for."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from realign.generation.generator import Request

KEY = "sk-canary-0123456789abcdef"
CHUNK = b" " * 65536
HUGE_CHUNKS = 2048  # 128 MiB


class FaultyServer:
    """A server that answers a prompt with ``answer to <prompt>``, after the faults that are set.

    Attributes:
        fault: Called with the prompt and the number of the attempt, from 0; names a method, or
            nothing for an answer. With arguments it is ``status|400`` or ``status|429|0.2``.
        asked: Attempts by prompt.
        answered: Answers sent by prompt.
        headers: Of every request.
        bodies: The last request's by prompt.
        delay_s: How long an answer takes.
        at_a_time: Requests being dealt with now.
        most_at_a_time: The most there have been.
    """

    def __init__(self) -> None:
        self.fault: Callable[[str, int], str] = lambda prompt, attempt: ""
        self.answer: Callable[[str], dict[str, Any]] = completion
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: dict[str, Any] = {}
        self.delay_s = 0.0
        self.at_a_time = self.most_at_a_time = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for headers, raw in requests_of(reader):
                body = json.loads(raw)
                prompt = body["messages"][-1]["content"][-1]["text"]
                attempt = self.asked[prompt]
                self.asked[prompt] += 1
                self.headers.append(headers)
                self.bodies[prompt] = body
                self.at_a_time += 1
                self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
                try:
                    name, *arguments = (self.fault(prompt, attempt) or "send_answer").split("|")
                    if name == "send_answer":
                        arguments = [prompt]
                    if name == "status":
                        arguments = [*arguments, headers.get("authorization", "")]
                    await getattr(self, name)(writer, *arguments)
                finally:
                    self.at_a_time -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as some tests want
        finally:
            writer.close()

    async def send_answer(self, writer: asyncio.StreamWriter, prompt: str) -> None:
        await asyncio.sleep(self.delay_s)
        await send(writer, 200, json.dumps(self.answer(prompt)).encode())
        self.answered[prompt] += 1

    async def status(self, writer: asyncio.StreamWriter, *arguments: str) -> None:
        """An error that repeats the key, as careless servers do."""
        code, *after, authorization = arguments
        headers = {"Retry-After": after[0]} if after else {}
        message = f"status {code} for {authorization}"
        await send(writer, int(code), json.dumps({"error": {"message": message}}).encode(), headers)

    async def redirect(self, writer: asyncio.StreamWriter, port: str) -> None:
        target = {"Location": f"http://127.0.0.1:{port}/v1/chat/completions"}
        await send(writer, 307, b"", target)

    async def hang(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(300)

    async def trickle(self, writer: asyncio.StreamWriter) -> None:
        """Never silent for long, and not done for minutes."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        await self._trickle(writer)

    async def trickle_head(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
        await self._trickle(writer)

    async def _trickle(self, writer: asyncio.StreamWriter) -> None:
        for _ in range(10000):
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def reset(self, writer: asyncio.StreamWriter) -> None:
        linger = struct.pack("ii", 1, 0)  # close with RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise ConnectionResetError

    async def close_silently(self, writer: asyncio.StreamWriter) -> None:
        raise ConnectionResetError

    def go_away(self, seconds: float) -> None:
        """Refuse connections for a while."""

        async def close() -> None:
            self._server.close()

        async def come_back() -> None:
            await asyncio.sleep(seconds)
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

        self._call(close())
        asyncio.run_coroutine_threadsafe(come_back(), self._loop)

    async def truncated(self, writer: asyncio.StreamWriter) -> None:
        """Half of the body that the header promises."""
        raw = json.dumps(completion("truncated")).encode()
        writer.write(head(200, {"Content-Length": str(len(raw))}) + raw[: len(raw) // 2])
        await writer.drain()
        raise ConnectionResetError

    async def cut_json(self, writer: asyncio.StreamWriter) -> None:
        raw = json.dumps(completion("cut")).encode()
        await send(writer, 200, raw[: len(raw) // 2])

    async def page(self, writer: asyncio.StreamWriter) -> None:
        await send(writer, 200, b"<html>Welcome</html>")

    async def nested(self, writer: asyncio.StreamWriter) -> None:
        await send(writer, 200, b"[" * 100_000)

    async def no_choices(self, writer: asyncio.StreamWriter) -> None:
        await send(writer, 200, b'{"choices": []}')

    async def given_up(self, writer: asyncio.StreamWriter) -> None:
        await send(writer, 200, json.dumps(completion("half of", finish_reason="abort")).encode())

    async def huge(self, writer: asyncio.StreamWriter, code: str = "200") -> None:
        """128 MiB, made as they are sent."""
        writer.write(head(int(code), {"Transfer-Encoding": "chunked"}))
        for _ in range(HUGE_CHUNKS):
            writer.write(b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def bomb(self, writer: asyncio.StreamWriter) -> None:
        """Says that it is compressed."""
        await send(writer, 200, b"\x1f\x8b" + bytes(100), {"Content-Encoding": "gzip"})


def completion(prompt: str, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """Return the reply of the server to a prompt."""
    full_message = {"role": "assistant", "content": f"answer to {prompt}", **message}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "served/model",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": full_message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


async def requests_of(
    reader: asyncio.StreamReader,
) -> AsyncIterator[tuple[dict[str, str], bytes]]:
    """Yield headers and body of each request of a connection."""
    while True:
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return
        assert lines[0] == "POST /v1/chat/completions HTTP/1.1", lines[0]
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        headers = {name.lower(): value for name, value in headers.items()}
        yield headers, await reader.readexactly(int(headers["content-length"]))


def head(code: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {code} X", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


async def send(
    writer: asyncio.StreamWriter, code: int, raw: bytes, headers: dict[str, str] | None = None
) -> None:
    writer.write(head(code, {"Content-Length": str(len(raw)), **(headers or {})}) + raw)
    await writer.drain()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Start a server that answers at once where no fault is set, with a key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    faulty = FaultyServer()
    yield faulty
    faulty.close()


@pytest.fixture
def second_server() -> Iterator[FaultyServer]:
    """Another host, for a redirect to point at."""
    other = FaultyServer()
    yield other
    other.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small PNG file."""
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.fixture
def ask_about(image: Path) -> Callable[..., list[Request]]:
    """Requests with the given prompts, all about one image."""
    return lambda *prompts: [Request(prompt, image) for prompt in prompts]
