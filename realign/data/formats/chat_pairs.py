"""Pairs of chat messages: TRL's preference datasets, the authors' published JSON, and the files
that LLaMA-Factory and ms-swift read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from realign.data.formats.conversation import (
    check_prompt,
    only_answer,
    read_turns,
    same_turns,
    split_answer,
)
from realign.data.formats.layout import (
    Draft,
    Layout,
    RawRow,
    RefusedRowError,
    Turns,
    text_of,
)
from realign.data.records import Message

IMAGE_KEYS = frozenset({"id", "image", "images"})
LISTS = frozenset({"images", "rejected_images"})  # TRL's keys; the authors' keys name one image


def _trl(row: RawRow, turns: Turns, num_images: int) -> Iterator[Draft]:
    prompt = row.get("prompt")
    if prompt is None:  # both answers repeat it
        yield from _conversations(row, turns, num_images)
        return
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": text_of(row, "prompt")}]
    read = read_turns(prompt, "prompt", num_images)
    yield Draft(check_prompt(read, "prompt"), _answer(row, "chosen"), _answer(row, "rejected"))


def _answer(row: RawRow, name: str) -> str:
    return text_of({name: only_answer(row.get(name), name)}, name)


def _conversations(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    """Read rows whose answers are whole conversations, as in the authors' JSON."""
    prompt, answer = _split(row, "chosen", num_images)
    other, rejected = _split(row, "rejected", num_images)
    if not same_turns(prompt, other):
        raise RefusedRowError(
            "rejected",
            "different-prompts",
            "rejected must differ from chosen in the last answer only. Make their turns equal or "
            "remove the row.",
        )
    retrieved = row.get("retrieved_image")
    source = {"retrieved_image": retrieved} if isinstance(retrieved, str) else {}
    yield Draft(prompt, answer, rejected, source=source)


def _split(row: RawRow, name: str, num_images: int) -> tuple[tuple[Message, ...], str]:
    prompt, answer = split_answer(_turns(row, name, num_images), name)
    return prompt, text_of({name: answer}, name)


def _turns(row: RawRow, name: str, num_images: int) -> list[Message]:
    """Return the turns of a row, after its system prompt if that has a key of its own."""
    turns = read_turns(row.get(name), name, num_images)
    system = text_of(row, "system", needed=False)
    if system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _llamafactory(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    name = "conversations" if "conversations" in row else "messages"
    prompt = check_prompt(_turns(row, name, num_images), name)
    yield Draft(prompt, _answer(row, "chosen"), _answer(row, "rejected"))


def _swift(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    turns = _turns(row, "messages", num_images)
    if turns[-1]["role"] == "user":  # a question alone
        yield Draft(check_prompt(turns, "messages"))
        return
    prompt, answer = split_answer(turns, "messages")
    rejected = text_of(row, "rejected_response", needed=False)
    if row.get("rejected_messages"):
        other, rejected = _split(row, "rejected_messages", num_images)
        if not same_turns(other, prompt):
            raise RefusedRowError(
                "rejected_messages",
                "different-prompts",
                "rejected_messages must differ from messages in the last answer only. Make their "
                "turns equal or remove the row.",
            )
    yield Draft(prompt, text_of({"messages": answer}, "messages"), rejected)


def _is_list(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), list) for name in names)


TRL = Layout(
    name="trl",
    summary="images, prompt, chosen, rejected: TRL, rlaif-v_formatted, a parquet of this project",
    keys=IMAGE_KEYS | {"prompt", "chosen", "rejected", "rejected_images"},
    matches=lambda row: (
        {"chosen", "rejected"} <= row.keys()
        and "img_path" not in row
        and ("prompt" in row or bool(LISTS & row.keys() and _is_list(row, "chosen", "rejected")))
    ),
    drafts=_trl,
)
OFFICIAL = Layout(
    name="official",
    summary="image, retrieved_image, chosen and rejected conversations: the authors' JSON",
    keys=IMAGE_KEYS | {"chosen", "rejected", "retrieved_image"},
    matches=lambda row: (
        _is_list(row, "chosen", "rejected")
        and not {"prompt", "question", "messages", "conversations", *LISTS} & row.keys()
    ),
    drafts=_conversations,
)
LLAMAFACTORY = Layout(
    name="llamafactory",
    summary="images, conversations, chosen, rejected: LLaMA-Factory",
    keys=IMAGE_KEYS | {"conversations", "messages", "chosen", "rejected", "system"},
    matches=lambda row: (
        ({"chosen", "rejected"} <= row.keys() and _is_list(row, "conversations"))
        or ({"chosen", "rejected"} <= row.keys() and _is_list(row, "messages"))
    ),
    drafts=_llamafactory,
)
SWIFT = Layout(
    name="ms-swift",
    summary="images, messages, rejected_response: ms-swift",
    keys=IMAGE_KEYS
    | {"messages", "rejected_response", "rejected_messages", "rejected_images", "system"},
    matches=lambda row: _is_list(row, "messages") and "chosen" not in row,
    drafts=_swift,
)
