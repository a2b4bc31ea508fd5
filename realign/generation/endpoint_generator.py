"""Generation by an OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, OpenAI."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image

from realign.data.images import FORMATS, decode_image
from realign.errors import RefusedError
from realign.generation.endpoint import (
    Endpoint,
    Reply,
    ask,
    count_tokens,
    error_message,
    open_client,
    read_answer,
    run_to_end,
)
from realign.generation.generator import Answer, Request
from realign.generation.journal import Journal
from realign.runtime.files import canonical_json, content_sha256, file_sha256
from realign.runtime.progress import announce

if TYPE_CHECKING:
    import openai

# OpenAI takes 50 MB per request, and base64 turns three bytes into four
MAX_SENT_BYTES = 20_000_000
# after this many refusals in a row, the server or the options are at fault, not the requests
MAX_REFUSED_IN_A_ROW = 16
# an overloaded server fails and answers by turns
ANNOUNCE_INTERVAL_S = 60.0
_OURS = ("messages", "model", "stream", "n")  # fields that are set here, beside those of Sampling


class TooLargeError(RefusedError):
    """An image that is too large to be sent in any encoding."""


def image_url(path: Path, max_bytes: int = MAX_SENT_BYTES) -> str:
    """Encode an image file as ``data:image/...;base64,...``.

    The file's own bytes are sent if every decoder reads the same picture from them: RGB or grey
    with eight bits, no rotation in EXIF, no transparency. Other images are decoded by
    :func:`realign.data.images.decode_image` and sent as PNG. If the result has more than
    ``max_bytes``, it is sent as JPEG with quality 95.

    Raises:
        TooLargeError: The image is too large even as JPEG.
        RefusedError: The image cannot be read.
    """
    raw = path.read_bytes()
    decoded = decode_image(raw, path.name)  # images that training would refuse are not sent
    with Image.open(io.BytesIO(raw)) as image:
        mime = f"image/{(image.format or '').lower()}"
        is_plain = (
            image.format in FORMATS  # a JPEG with a preview beside it calls itself MPO
            and image.mode in ("RGB", "L")
            and "transparency" not in image.info
            and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        )
    if not is_plain:
        raw, mime = _encoded(decoded, "PNG"), "image/png"
    if len(raw) > max_bytes:
        raw, mime = _encoded(decoded, "JPEG"), "image/jpeg"
    if len(raw) > max_bytes:
        raise TooLargeError(
            f"{path.name}: image must fit into {max_bytes} bytes as JPEG to be sent, got "
            f"{len(raw)}. Shrink it."
        )
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    image.save(buffer, form, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Sampling:
    """Sampling options of a request. After a change of any option, all requests are sent again.

    Attributes:
        model: Name of the model on the server.
        max_new_tokens: Longest answer in tokens; None leaves it to the server.
        temperature: 0 is greedy; None leaves it to the server, for models that accept no other.
        seed: Seed; None sends no seed.
        length_field: ``max_tokens`` for servers that ignore the newer name, such as those of before
            2025 and ``transformers serve`` before 5.23.
        extra_body: Further fields of the request, such as
            ``{"chat_template_kwargs": {"enable_thinking": False}}``. They are stored in the journal
            and must not hold secrets.
    """

    model: str
    max_new_tokens: int | None
    temperature: float | None = 0.0
    seed: int | None = 0
    length_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = (*_OURS, "temperature", "seed", "max_tokens", "max_completion_tokens")
        if taken := [name for name in self.extra_body if name in fields]:
            raise RefusedError(
                f"extra_body must not hold {taken[0]!r}, which has an option of its own or cannot "
                "be changed. Remove it."
            )

    def body(self) -> dict[str, Any]:
        """Return the request without its messages, as arguments of the client."""
        fields = {
            "model": self.model,
            self.length_field: self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "extra_body": dict(self.extra_body) or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class Counts:
    """Counts of a generator's requests and tokens so far.

    Attributes:
        asked: Requests that the server answered or refused.
        from_journal: Requests whose answer was stored, or that equal another one of their call.
        refused: Requests that the server refused; they are among ``asked``.
        unsent: Requests whose image is too large to be sent.
        retries: Retries after temporary failures.
        prompt_tokens: Prompt tokens as the server counts them, with images if it does.
        completion_tokens: Completion tokens as the server counts them.
    """

    asked: int = 0
    from_journal: int = 0
    refused: int = 0
    unsent: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class _Question:
    key: str
    request: Request
    image_sha256: str


class EndpointGenerator:
    """Generator that sends each prompt, with or without an image, to a server once.

    Every answer is written to the journal before it is used, so that another run with the same
    journal sends only the missing requests. The generator can be called from any thread or process,
    one call at a time, also inside a running event loop. It holds no connection between calls.

    A request that the server refuses (too long, filtered) gets an ``Answer`` with a ``problem``.
    Refusals are written to the journal once another request was answered or the call ends. After
    ``MAX_REFUSED_IN_A_ROW`` refusals without an answer in between, the run stops, since the rows
    are not at fault: the name of the model may be wrong. A request whose image is too large gets a
    ``problem`` too, but no line in the journal, because it is not sent.

    The failure of a server is announced once until it answers again, and at most once in
    ``ANNOUNCE_INTERVAL_S``.

    Args:
        endpoint: Address of the server.
        sampling: Options of the requests.
        journal: File of the answers, which is locked until :meth:`close`.
    Raises:
        RefusedError: The journal is in use or damaged, or the key cannot be sent.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, journal: Path) -> None:
        endpoint.key()
        self.counts = Counts()
        self._endpoint = endpoint
        self._sampling = sampling
        self._refused: list[tuple[_Question, Reply]] = []  # not in the journal yet
        self._refused_in_a_row = 0
        self._is_failing = False  # whether a failure was announced since the last answer
        self._announced_at = -math.inf
        self._unsent: dict[str, str] = {}  # key to reason, in the current call
        self._journal = Journal(journal)

    def __enter__(self) -> EndpointGenerator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer each request, in order.

        Raises:
            RefusedError: An image cannot be read, or the server cannot be reached, refuses every
                request or keeps failing. The same call later sends only the missing requests.
        """
        paths = {request.image for request in requests}
        hashes = {path: file_sha256(path) if path else "" for path in paths}
        questions = [self._question(request, hashes[request.image]) for request in requests]
        missing = {
            question.key: question for question in questions if question.key not in self._journal
        }
        self.counts.from_journal += len(questions) - len(missing)
        self._unsent.clear()
        try:
            if missing:
                run_to_end(self._ask_all(list(missing.values())))
            self._keep_refused()
        finally:
            self._refused.clear()
            self._journal.sync()
        return [self._answer(question.key) for question in questions]

    def _question(self, request: Request, image_sha256: str) -> _Question:
        asked = {
            "prompt": request.prompt,
            "image_sha256": image_sha256,
            "sampling": asdict(self._sampling),
            **({"system": request.system} if request.system else {}),
        }
        # without the server's address: the same model on another server is not asked again
        return _Question(content_sha256(canonical_json(asked)), request, image_sha256)

    def _answer(self, key: str) -> Answer:
        if key in self._unsent:
            return Answer("", problem=f"image too large to send: {self._unsent[key]}")
        entry = self._journal[key]
        return read_answer(Reply(entry["status"], entry["response"]))

    async def _ask_all(self, questions: Sequence[_Question]) -> None:
        waiting = iter(questions)
        try:
            async with open_client(self._endpoint) as client, asyncio.TaskGroup() as group:
                for _ in range(min(self._endpoint.concurrency, len(questions))):
                    group.create_task(self._ask_waiting(client, waiting))
        except ExceptionGroup as failures:  # the first failure cancels the other tasks
            raise failures.exceptions[0] from None

    async def _ask_waiting(self, client: openai.AsyncOpenAI, waiting: Iterator[_Question]) -> None:
        for question in waiting:
            content: list[dict[str, Any]] = [{"type": "text", "text": question.request.prompt}]
            try:
                if question.request.image:
                    url = await asyncio.to_thread(image_url, question.request.image)
                    content.insert(0, {"type": "image_url", "image_url": {"url": url}})
            except TooLargeError as error:
                self._unsent[question.key] = str(error)
                self.counts.unsent += 1
                continue
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if question.request.system:
                messages.insert(0, {"role": "system", "content": question.request.system})
            body = {**self._sampling.body(), "messages": messages}
            was_reached = self.counts.asked > 0
            reply = await ask(client, self._endpoint, body, was_reached, self._on_retry)
            self._take(question, reply)

    def _on_retry(self, failure: str, wait_s: float) -> None:
        self.counts.retries += 1
        if self._is_failing or time.monotonic() - self._announced_at < ANNOUNCE_INTERVAL_S:
            return
        self._is_failing, self._announced_at = True, time.monotonic()
        tries = self._endpoint.max_retries
        waits = sum(map(self._endpoint.longest_wait_s, range(tries)))
        announce(
            f"{self._endpoint.base_url} fails: {failure}. It is asked again in "
            f"{math.ceil(wait_s)} s, and up to {tries} times ({math.ceil(waits)} s of waiting) "
            "before the run stops"
        )

    def _take(self, question: _Question, reply: Reply) -> None:
        self.counts.asked += 1
        self._is_failing = False
        if reply.status != 200:
            self.counts.refused += 1
            self._refused.append((question, reply))
            self._refused_in_a_row += 1
            if self._refused_in_a_row == MAX_REFUSED_IN_A_ROW:
                raise RefusedError(
                    f"{self._endpoint.base_url} has refused {MAX_REFUSED_IN_A_ROW} requests in a "
                    f"row, the last with {reply.status}, {error_message(reply.body)}. Correct the "
                    "model's name or the options of the request, or look at the server."
                )
            return
        self._refused_in_a_row = 0
        self._keep_refused()
        self._keep(question, reply)
        prompt_tokens, completion_tokens = count_tokens(reply.body)
        self.counts.prompt_tokens += prompt_tokens
        self.counts.completion_tokens += completion_tokens

    def _keep_refused(self) -> None:
        for question, reply in self._refused:
            self._keep(question, reply)
        self._refused.clear()

    def _keep(self, question: _Question, reply: Reply) -> None:
        asked = {
            "prompt": question.request.prompt,
            "image": question.request.image.name if question.request.image else None,
            "image_sha256": question.image_sha256,
            **({"system": question.request.system} if question.request.system else {}),
            **asdict(self._sampling),
        }
        entry = {"request": asked, "status": reply.status, "response": reply.body}
        self._journal.append(question.key, entry)
