"""Reading responses, whole and broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from realign.generation.endpoint import (
    MalformedError,
    Reply,
    count_tokens,
    error_message,
    read_answer,
    read_completion,
    without_secret,
)
from realign.generation.generator import Answer


def response(content: Any, ending: Any = "stop", **message: Any) -> dict[str, Any]:
    full_message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": full_message, "finish_reason": ending}]}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (response(" A dog. "), Answer("A dog.")),
        (response("A dog wi", "length"), Answer("A dog wi", is_cut=True)),
        (response(None, "length"), Answer("", is_cut=True)),  # all of it went into reasoning
        (response(None), Answer("")),
        (
            response("A", "content_filter"),
            Answer("", False, "refused by the server: content filter"),
        ),
        (response(None, refusal="No."), Answer("", False, "refused by the server: No.")),
        (response("a\ud83d\ude00b\ud800c"), Answer("a\U0001f600b\ufffdc")),
    ],
)
def test_the_answer_text_is_read_from_a_response(body: dict[str, Any], answer: Answer) -> None:
    assert read_answer(Reply(200, read_completion(json.dumps(body).encode()))) == answer
    answer.text.encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"choices": [{"mess', "not JSON"),
        (b"null", r"no choices\[0\]"),
        (b'{"choices": {}}', r"no choices\[0\]"),
        (b'{"choices": []}', r"no choices\[0\]"),
        (b'{"choices": [null]}', r"no choices\[0\]"),
        (b'{"choices": [{"message": {}, "finish_reason": "stop"}]}', r"no choices\[0\]"),
        (json.dumps(response(["a"])).encode(), "is not a text"),
        (json.dumps(response("a", None)).encode(), "no whole answer, finish_reason None"),
        (json.dumps(response("a", "abort")).encode(), "no whole answer, finish_reason 'abort'"),
    ],
)
def test_a_malformed_response_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        read_completion(raw)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "code": 400}},
        {"object": "error", "message": "too long"},
        {"message": "too\n long"},
        {"detail": "too long"},
        {"error": "too long"},
        "too long",
    ],
)
def test_the_error_message_of_a_server_is_found(body: Any) -> None:
    assert error_message(body) == "too long"
    assert read_answer(Reply(400, body)) == Answer("", False, "refused by the server: too long")


def test_an_error_of_an_unknown_form_is_shown_as_received() -> None:
    assert error_message({"detail": [{"loc": ["body"]}]}) == '[{"loc": ["body"]}]'
    assert error_message("") == "no reason given"
    assert len(error_message("x" * 1000)) == 300


def test_tokens_are_counted_where_the_server_reports_them() -> None:
    assert count_tokens({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}) == (3, 4)
    assert count_tokens({"usage": None}) == (0, 0)
    assert count_tokens({"usage": {"prompt_tokens": "3"}}) == (0, 0)


def test_a_repeated_api_key_is_redacted_and_ordinary_words_are_not() -> None:
    body = json.loads(r'{"sk-abcdef\"12": ["Bearer sk-\u0061bcdef\"12"], "n": 1.5, "none": null}')
    assert without_secret(body, 'sk-abcdef"12') == {"***": ["Bearer ***"], "n": 1.5, "none": None}
    assert without_secret(body, "none") == body
    assert without_secret(body, "") == body
