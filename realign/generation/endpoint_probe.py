"""Checks of a server before any work: it can be reached, accepts the key and serves the model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from realign.errors import RefusedError
from realign.generation.endpoint import (
    Endpoint,
    TooLargeResponseError,
    failure_of,
    lasting_refusal,
    open_client,
    run_to_end,
    unreachable,
)

# a busy server may be slow to answer
LONGEST_PROBE_S = 20.0
_ALWAYS_WITH_KEY = ("api.openai.com",)
_SHOWN = 8  # number of models that a message names


def check_key(endpoint: Endpoint, *, is_named: bool = False) -> None:
    """Check that the key is set if one is required. Nothing is sent.

    Args:
        endpoint: The server.
        is_named: Whether the user named the variable, which must then be set.
    Raises:
        RefusedError: The variable is not set, or its key cannot be sent in a header.
    """
    host = urlsplit(endpoint.base_url).hostname
    if not endpoint.key() and (is_named or host in _ALWAYS_WITH_KEY):
        option, variable = endpoint.other_option("api_key_env"), endpoint.api_key_env
        remedy = f"drop {option}" if is_named else f"name another one with {option}"
        raise RefusedError(
            f"{option} must name an environment variable that holds the key for "
            f"{endpoint.base_url}, got {variable}, which is not set. Set it, or {remedy}."
        )


def check_server(endpoint: Endpoint, model: str, length_field: str = "max_tokens") -> None:
    """Check that a server can be reached, accepts the key and serves the model.

    The server is asked for its list of models. If that is not conclusive (there is no list, the key
    may not read it, or the model is not in it), one question is asked, with an answer of one token.
    A server that is too busy for both is accepted, since a run will ask it again.

    Args:
        endpoint: The server.
        model: Name of the model on the server.
        length_field: Name of the length limit in a request.
    Raises:
        RefusedError: One of the three fails; the message names the option, the value and the
            remedy.
    """
    run_to_end(_check(endpoint, model, length_field))


async def _check(endpoint: Endpoint, model: str, length_field: str) -> None:
    quick = dataclasses.replace(endpoint, timeout_s=min(endpoint.timeout_s, LONGEST_PROBE_S))
    question: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        length_field: 1,
    }
    async with open_client(quick) as client:
        listed = await _answer(quick, client.models.with_raw_response.list())
        # with any other status, the server may just have no list
        if (
            isinstance(listed, openai.APIStatusError)
            and listed.status_code == 401
            and (refusal := lasting_refusal(endpoint, listed))
        ):
            raise refusal
        names = _names(listed) if isinstance(listed, bytes) else []
        if model in names:
            return
        reply = await _answer(quick, client.chat.completions.with_raw_response.create(**question))
    if not isinstance(reply, openai.APIStatusError):
        if reply is not None and not _is_object(reply):
            raise RefusedError(
                f"{endpoint.option} must be of an OpenAI-compatible server, got "
                f"{endpoint.base_url}, which answers with another page. Correct {endpoint.option}, "
                "which usually ends in /v1."
            )
        return
    if names and reply.status_code in (400, 404, 422):
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        option = endpoint.other_option("model")
        raise RefusedError(
            f"{option} must be a model that {endpoint.base_url} serves ({shown}), got {model} "
            f"({failure_of(endpoint, reply)}). Correct {option}, or serve it."
        )
    if refusal := lasting_refusal(endpoint, reply):
        raise refusal


async def _answer(endpoint: Endpoint, request: Any) -> bytes | openai.APIStatusError | None:
    """Return the body of an answer, or the server's error; None if there is neither.

    Raises:
        RefusedError: The server cannot be connected to.
    """
    try:
        async with asyncio.timeout(endpoint.timeout_s):  # also for a body that arrives slowly
            response = await request
        return bytes(response.content)
    except openai.APIStatusError as error:
        return error
    except openai.APIConnectionError as error:  # time-outs too
        cause = error.__cause__
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise unreachable(endpoint, f"{type(cause).__name__}: {cause}") from None
        return None
    except (TimeoutError, TooLargeResponseError):
        return None


def _is_object(raw: bytes) -> bool:
    """Return whether a body is a JSON object, as every answer of the API is."""
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
        return False


def _names(raw: bytes) -> list[str]:
    """Return the names in a list of models; none if the body is something else."""
    try:
        models = json.loads(raw)["data"]
        return [str(model["id"]) for model in models]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
