"""Single requests to an OpenAI-compatible server: the client with its limits of size and time,
retries, and the parsing of responses.

Requests use only what vLLM, SGLang, ``transformers serve`` and OpenAI all support: chat completions
with ``max_completion_tokens``, ``temperature`` and ``seed``, and images as data URLs.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from realign.errors import RefusedError
from realign.generation.generator import Answer

try:
    import httpx2  # the openai client's own
    import openai
except ImportError:
    raise RefusedError(
        "An endpoint requires the openai client. Install 'realign[pipeline,endpoint]'."
    ) from None

# reasons with which vLLM and SGLang end a request that they gave up; its text is no answer
_GIVEN_UP = ("abort", "error")
# Shorter keys are no secrets ("EMPTY", "none") and could be words of an answer.
_SHORTEST_SECRET = 8
# an answer of 8,192 tokens with its reasoning has some 100 kB
MAX_RESPONSE_BYTES = 4_000_000
LONGEST_BACKOFF_S = 30.0
LONGEST_RETRY_AFTER_S = 300.0
_jitter = random.SystemRandom()  # forked workers must not draw the same numbers
# statuses about a single request: too long, filtered, image refused
_OF_ONE_REQUEST = (400, 413, 415, 422)
_NO_KEY = "none"  # the client requires a key
_ABOUT_THIS_MACHINE = [
    *("X-Stainless-OS", "X-Stainless-Arch", "X-Stainless-Runtime", "X-Stainless-Runtime-Version"),
    *("X-Stainless-Lang", "X-Stainless-Package-Version"),
]
_TEMPORARY = (408, 409, 425, 429)  # and 5xx


class Reply(NamedTuple):
    """An answer (status 200) or the refusal of one request (400, 413, 415, 422)."""

    status: int
    body: Any  # the server's JSON, or its text if it is not JSON


class MalformedError(Exception):
    """A response that is not a chat completion: incomplete, not JSON, or without an answer."""


def read_completion(raw: bytes) -> dict[str, Any]:
    """Parse a response and check that it has an answer.

    Raises:
        MalformedError: The message says what is wrong.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON ({error}): {raw[:200]!r}") from None
    choice = _first_choice(body)
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or "content" not in message:
        raise MalformedError(f"no choices[0].message.content: {raw[:200]!r}")
    if not isinstance(message["content"], str | None):
        raise MalformedError(f"choices[0].message.content is not a text: {raw[:200]!r}")
    ending = choice.get("finish_reason")
    if not isinstance(ending, str) or ending in _GIVEN_UP:
        raise MalformedError(f"no whole answer, finish_reason {ending!r}: {raw[:200]!r}")
    assert isinstance(body, dict)
    return body


def _first_choice(body: Any) -> Any:
    choices = body.get("choices") if isinstance(body, dict) else None
    return choices[0] if isinstance(choices, list) and choices else None


def read_answer(reply: Reply) -> Answer:
    """Return the model's answer in a reply."""
    if reply.status != 200:
        return Answer("", problem=f"refused by the server: {error_message(reply.body)}")
    choice = reply.body["choices"][0]
    refusal = choice["message"].get("refusal")
    if choice["finish_reason"] == "content_filter" or refusal:
        return Answer("", problem=f"refused by the server: {refusal or 'content filter'}")
    # JSON can hold half a surrogate pair, which UTF-8 cannot encode
    text = (choice["message"]["content"] or "").encode("utf-16", "surrogatepass")
    return Answer(text.decode("utf-16", "replace").strip(), choice["finish_reason"] == "length")


def error_message(body: Any) -> str:
    """Return the message of a server's error, wherever in the response it is."""
    if isinstance(body, dict):
        for name in ("message", "error", "detail"):
            if body.get(name):
                return error_message(body[name])
    text = body if isinstance(body, str) else json.dumps(body)
    return " ".join(text.split())[:300] or "no reason given"


def count_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of prompt and completion tokens that a server reports, or 0."""
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (
        prompt if isinstance(prompt, int) else 0,
        completion if isinstance(completion, int) else 0,
    )


def without_secret(value: Any, secret: str) -> Any:
    """Return JSON data with a secret that the server repeated replaced by ``***``."""
    if len(secret) < _SHORTEST_SECRET:
        return value
    return json.loads(json.dumps(value).replace(json.dumps(secret)[1:-1], "***"))


@dataclass(frozen=True)
class Endpoint:
    """Address and limits of a server. Nothing here changes an answer.

    Attributes:
        base_url: URL above ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        api_key_env: Environment variable of the key; without it no key is sent.
        concurrency: Largest number of concurrent requests.
        timeout_s: Longest time from a request to the end of its answer in seconds, queueing
            included.
        max_retries: Largest number of retries of a request after a temporary failure.
        backoff_s: Longest wait before the first retry in seconds; doubled for each further one.
        option: Name of the option that sets ``base_url``, for messages. The options of the key's
            variable and of the model are named after it.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 120.0
    max_retries: int = 6
    backoff_s: float = 1.0
    option: str = "endpoint"

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise RefusedError(
                f"{self.option} must be an http or https URL, got {self.base_url!r}. For example "
                "http://127.0.0.1:8000/v1."
            )
        if "@" in url.netloc or url.query or url.fragment:
            # The URL is not shown, since it may hold a password.
            raise RefusedError(
                f"{self.option} must be a plain URL, got one of {url.hostname} with user, query or "
                f"fragment. Put the key into the environment variable {self.api_key_env}."
            )

    def other_option(self, name: str) -> str:
        """Return the full name of another option of this server, for messages."""
        return self.option.removesuffix("endpoint") + name

    def longest_wait_s(self, attempt: int) -> float:
        """Return the longest wait in seconds after an attempt, counted from 0."""
        return min(self.backoff_s * 2**attempt, LONGEST_BACKOFF_S)

    def key(self) -> str:
        """Return the key, or an empty text without one.

        Raises:
            RefusedError: The key cannot be sent in a header. The message does not show it.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RefusedError(
                f"{self.api_key_env} must hold a key of printable ASCII without spaces. Set it "
                "again."
            )
        return key


def open_client(endpoint: Endpoint) -> openai.AsyncOpenAI:
    """Return a client that follows no redirects and limits the size of responses. It does not
    retry; :func:`ask` does.
    """
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url,
        api_key=endpoint.key() or _NO_KEY,
        max_retries=0,
        default_headers={"Accept-Encoding": "identity"},
        http_client=openai.DefaultAsyncHttpxClient(
            follow_redirects=False,  # the key must not be sent to another host
            timeout=endpoint.timeout_s,
            event_hooks={"request": [_remove_headers], "response": [_limit_size]},
        ),
    )


async def _remove_headers(request: httpx2.Request) -> None:
    """Remove the header of a missing key, and the headers that describe this machine."""
    if request.headers.get("Authorization") == f"Bearer {_NO_KEY}":
        del request.headers["Authorization"]
    for name in _ABOUT_THIS_MACHINE:
        request.headers.pop(name, None)


class TooLargeResponseError(Exception):
    """A response that is larger than ``MAX_RESPONSE_BYTES``, or may be."""


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_RESPONSE_BYTES:
                raise TooLargeResponseError(f"more than {MAX_RESPONSE_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _limit_size(response: httpx2.Response) -> None:
    """Replace the body, before it is read, by one that raises an error at the limit."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise TooLargeResponseError("a compressed body, whose size cannot be bounded")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _BoundedStream(response.stream)


async def ask(
    client: openai.AsyncOpenAI,
    endpoint: Endpoint,
    body: Mapping[str, Any],
    was_reached: bool,
    on_retry: Callable[[str, float], None],
) -> Reply:
    """Send a request until there is an answer or a refusal.

    Args:
        client: Client from :func:`open_client`.
        endpoint: Endpoint of the client.
        body: The request.
        was_reached: Whether the server has answered before, so that a refused connection may be
            temporary.
        on_retry: Function that is called before each retry, with the failure (without the key) and
            the seconds until the retry.
    Raises:
        RefusedError: The server cannot be reached, refuses every request (401, 403, 404, ...), or
            has failed too often.
    """
    key = endpoint.key()
    for attempt in range(endpoint.max_retries + 1):
        # random, so that requests are not all retried at once
        wait = endpoint.longest_wait_s(attempt) * _jitter.uniform(0.5, 1)
        try:
            async with asyncio.timeout(endpoint.timeout_s):  # also for a body that arrives slowly
                response = await client.chat.completions.with_raw_response.create(**body)
            return Reply(200, without_secret(read_completion(response.content), key))
        except openai.APIStatusError as error:
            was_reached = True
            if error.status_code in _OF_ONE_REQUEST:
                answer = error.body if error.body is not None else error.response.text
                return Reply(error.status_code, without_secret(answer, key))
            failure = failure_of(endpoint, error)
            if refusal := lasting_refusal(endpoint, error):
                raise refusal from None
            wait = max(wait, _retry_after(error.response.headers.get("retry-after", "")))
        except (openai.APITimeoutError, TimeoutError):
            failure = f"no answer within {endpoint.timeout_s:g} s"
        except openai.APIConnectionError as error:
            failure = f"{type(error.__cause__).__name__}: {error.__cause__}"
            if isinstance(error.__cause__, httpx2.ConnectError) and not was_reached:
                raise unreachable(endpoint, failure) from None
        except (MalformedError, TooLargeResponseError) as error:
            failure = without_secret(f"a response that is {error}", key)
        if wait > LONGEST_RETRY_AFTER_S:
            raise RefusedError(
                f"{endpoint.base_url} asks to wait {wait:.0f} s ({failure}). Start again after "
                "that time."
            )
        if attempt < endpoint.max_retries:
            on_retry(failure, wait)
            await asyncio.sleep(wait)
    raise RefusedError(
        f"{endpoint.base_url} failed {endpoint.max_retries + 1} times for one request, the last "
        f"time with {failure}. Check the server, then start again: its answers so far are kept."
    )


def failure_of(endpoint: Endpoint, error: openai.APIStatusError) -> str:
    """Return the status and the message of a server's error, without the key."""
    message = error_message(error.body if error.body is not None else error.response.text)
    return str(without_secret(f"{error.status_code}, {message}", endpoint.key()))


def lasting_refusal(endpoint: Endpoint, error: openai.APIStatusError) -> RefusedError | None:
    """Return the error that ends a run if a server refuses every request; None if it may answer
    later, or refuses this one request only.
    """
    status, failure = error.status_code, failure_of(endpoint, error)
    if error.code == "insufficient_quota":
        return RefusedError(
            f"{endpoint.base_url} answers {failure}. Buy or free quota, then start again."
        )
    if status in (*_OF_ONE_REQUEST, *_TEMPORARY) or status >= 500:
        return None
    remedy = f"Correct {endpoint.option}."
    if status in (401, 403):
        variable, option = endpoint.api_key_env, endpoint.other_option("api_key_env")
        state, remedy = (
            (f"with the key in the environment variable {variable}", "Set it to another key")
            if endpoint.key()
            else (f"without a key: the environment variable {variable} is not set", "Set it")
        )
        failure, remedy = f"{failure}, {state}", f"{remedy}, or name another with {option}."
    elif status == 404:
        remedy = (
            f"Correct {endpoint.option}, which usually ends in /v1, or "
            f"{endpoint.other_option('model')}."
        )
    elif 300 <= status < 400:
        remedy = f"Redirects are not followed; set {endpoint.option} to where the server is."
    return RefusedError(
        f"{endpoint.option} {endpoint.base_url} refuses every request with {failure}. {remedy}"
    )


def unreachable(endpoint: Endpoint, failure: str) -> RefusedError:
    """Return the error for a server that cannot be reached."""
    return RefusedError(
        f"{endpoint.option} must be of a server that can be reached, got {endpoint.base_url} "
        f"({failure}). Start the server, check the network, or correct {endpoint.option}."
    )


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine from synchronous code, also inside a running event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def _retry_after(header: str) -> float:
    """Return the seconds that a server asks to wait, as a number or as a date."""
    try:
        wait = float(header)
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        wait = email.utils.mktime_tz(parsed) - time.time() if parsed else 0.0
    return wait if wait > 0 else 0.0  # 0 for NaN too
