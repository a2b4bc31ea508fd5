"""Turns of a conversation in the forms that datasets use: ``{from, value}`` as in LLaVA, and
``{role, content}`` with a string or a list of parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from realign.data.formats.layout import RefusedRowError
from realign.data.records import IMAGE_TOKEN, Message

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"} | {
    "system": "system"
}


def read_turns(value: Any, name: str, num_images: int) -> list[Message]:
    """Return messages with string contents, without images and their placeholders.

    Args:
        value: A list of turns in any of these forms.
        name: The key of the turns, for the message.
        num_images: Number of images of the row.
    Raises:
        RefusedRowError: The value is not such a list, has an unknown role, or more placeholders
            than images.
    """
    if not isinstance(value, list) or not value:
        raise RefusedRowError(
            name,
            "wrong-type",
            f"{name} must be a list of turns, got {value!r:.80}. Write them as "
            '[{"role": "user", "content": ...}].',
        )
    turns: list[Message] = []
    num_parts = 0
    for turn in value:
        role, text, images = _turn(turn, name)
        num_parts += images
        if role == "user" and not any(turn["role"] == "user" for turn in turns):
            text = without_placeholders(text, name, num_images)
        turns.append({"role": role, "content": text})
    _check_count(num_parts, "image parts", name, num_images)
    return turns


def same_turns(turns: Sequence[Message], others: Sequence[Message]) -> bool:
    """Return whether turns are equal apart from whitespace around their texts."""
    first, second = (
        [(turn["role"], turn["content"].strip()) for turn in conversation]
        for conversation in (turns, others)
    )
    return first == second


def without_placeholders(text: str, name: str, num_images: int) -> str:
    """Return a user turn without its image placeholders.

    Raises:
        RefusedRowError: The turn has more placeholders than the row has images.
    """
    count = text.count(IMAGE_TOKEN)
    _check_count(count, IMAGE_TOKEN, name, num_images)
    return text.replace(IMAGE_TOKEN, "").strip() if count else text


def _check_count(count: int, kind: str, name: str, num_images: int) -> None:
    if count > num_images:
        raise RefusedRowError(
            name,
            "image-count",
            f"{name} must have at most as many {kind} as the row has images, {num_images}, got "
            f"{count}. Remove the others, or the row.",
        )


def _turn(turn: Any, name: str) -> tuple[str, str, int]:
    """Return the role, the text and the number of image parts of one turn."""
    if isinstance(turn, Mapping):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(role, str) and role in ROLES:
            if isinstance(content, str):
                return ROLES[role], content, 0
            if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
                kinds = [part.get("type") for part in content]
                texts = [part.get("text") for part in content if part.get("type") == "text"]
                if all(isinstance(text, str) for text in texts) and {*kinds} <= {"text", "image"}:
                    return ROLES[role], "".join(map(str, texts)), kinds.count("image")
    raise RefusedRowError(
        name,
        "messages",
        f"{name} must have turns of user and assistant with a text, got {turn!r:.80}. Correct the "
        "turn or remove the row.",
    )


def check_prompt(turns: Sequence[Message], name: str) -> tuple[Message, ...]:
    """Return the turns after checking that an answer can follow them: user and assistant alternate,
    the last turn is the user's, and a system turn may come first.

    Raises:
        RefusedRowError: No answer can follow the turns.
    """
    roles = [turn["role"] for turn in turns]
    after_system = roles[1:] if roles[:1] == ["system"] else roles
    if (
        not after_system
        or after_system != (["user", "assistant"] * len(roles))[: len(after_system)]
    ):
        raise _roles(name, roles)
    if after_system[-1] != "user":
        raise _roles(name, roles)
    return tuple(turns)


def split_answer(turns: Sequence[Message], name: str) -> tuple[tuple[Message, ...], str]:
    """Return the prompt of a conversation and its last answer.

    Raises:
        RefusedRowError: The conversation does not end with an answer, or its turns do not
            alternate.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise _roles(name, [turn["role"] for turn in turns])
    return check_prompt(turns[:-1], name), turns[-1]["content"]


def only_answer(value: Any, name: str) -> str:
    """Return the text of an answer: a string, one assistant turn, or a list of one.

    Raises:
        RefusedRowError: The value is none of these.
    """
    if isinstance(value, str):
        return value
    value = [value] if isinstance(value, Mapping) else value
    if isinstance(value, list) and any(_turn(turn, name)[2] for turn in value):
        raise RefusedRowError(
            name,
            "image-count",
            f"{name} must have no image parts, got {value!r:.80}. Move them to the prompt or "
            "remove the row.",
        )
    turns = read_turns(value, name, 0)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RefusedRowError(
            name,
            "turns",
            f"{name} must be one assistant turn, got {[turn['role'] for turn in turns]}. Move "
            "other turns to the prompt.",
        )
    return turns[0]["content"]


def _roles(name: str, roles: Sequence[str]) -> RefusedRowError:
    return RefusedRowError(
        name,
        "turns",
        f"{name} must alternate user and assistant turns, got {list(roles)[:8]}. Correct the turns "
        "or remove the row.",
    )
