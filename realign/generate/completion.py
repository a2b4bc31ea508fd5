"""Reading what a chat completion server sent back. Knows no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from realign.generate.answer import Answer

# vLLM and SGLang end with these when they gave a request up; its text is not what the model says
_GIVEN_UP = ("abort", "error")
# Shorter ones are no secrets ("EMPTY", "none") and could be words of an answer
_SHORTEST_SECRET = 8


class Reply(NamedTuple):
    """An answer (status 200) or the refusal of one request (400, 413, 415, 422)."""

    status: int
    body: Any  # the server's JSON, or its text where it is none


class MalformedError(Exception):
    """A response that is no chat completion: cut, not JSON, or without an answer."""


def read_completion(raw: bytes) -> dict[str, Any]:
    """Parse a response and check that an answer is in it.

    Raises:
        MalformedError: Saying what is wrong.
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
        raise MalformedError(f"choices[0].message.content is no text: {raw[:200]!r}")
    ending = choice.get("finish_reason")
    if not isinstance(ending, str) or ending in _GIVEN_UP:
        raise MalformedError(f"no whole answer, finish_reason {ending!r}: {raw[:200]!r}")
    assert isinstance(body, dict)
    return body


def _first_choice(body: Any) -> Any:
    choices = body.get("choices") if isinstance(body, dict) else None
    return choices[0] if isinstance(choices, list) and choices else None


def read_answer(reply: Reply) -> Answer:
    """Return what the model says in a reply."""
    if reply.status != 200:
        return Answer("", problem=f"refused by the server: {error_message(reply.body)}")
    choice = reply.body["choices"][0]
    refusal = choice["message"].get("refusal")
    if choice["finish_reason"] == "content_filter" or refusal:
        return Answer("", problem=f"refused by the server: {refusal or 'content filter'}")
    # JSON can hold half a surrogate pair, UTF-8 cannot
    text = (choice["message"]["content"] or "").encode("utf-16", "surrogatepass")
    return Answer(text.decode("utf-16", "replace").strip(), choice["finish_reason"] == "length")


def error_message(body: Any) -> str:
    """Return the sentence in a server's error, in whichever of the usual places it is."""
    if isinstance(body, dict):
        for name in ("message", "error", "detail"):
            if body.get(name):
                return error_message(body[name])
    text = body if isinstance(body, str) else json.dumps(body)
    return " ".join(text.split())[:300] or "no reason given"


def count_tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the prompt and completion tokens that a server says it used, 0 where it does not."""
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
