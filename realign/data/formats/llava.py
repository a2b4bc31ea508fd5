"""Conversations between ``human`` and ``gpt`` about one image: LLaVA-Instruct-150K, and POVID with
a second conversation whose last answer is the rejected one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from realign.data.formats.conversation import check_prompt, read_turns, split_answer
from realign.data.formats.layout import Draft, Layout, RawRow, RefusedRowError, Turns, image_of
from realign.data.records import Message


def _matches_llava(row: Mapping[str, Any]) -> bool:
    return "conversations" in row and not {"chosen", "rejected_conversations"} & row.keys()


def _llava(row: RawRow, turns: Turns) -> Iterator[Draft]:
    image = image_of(row)
    conversation = read_turns(row.get("conversations"), "conversations")
    if len(conversation) == 1:  # a question alone
        yield Draft(image, check_prompt(conversation, "conversations"))
        return
    split_answer(conversation, "conversations")
    answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
    picked = {"first": answers[:1], "last": answers[-1:], "each": answers}[turns]
    for i in picked:
        if not conversation[i]["content"]:
            raise RefusedRowError(
                "conversations",
                "empty",
                f"conversations must have no empty answer, got one as turn {i + 1}. Fill it in or "
                "remove the row.",
            )
        yield Draft(
            image,
            tuple(conversation[:i]),
            conversation[i]["content"],
            turn=answers.index(i) + 1,
        )


def _povid(row: RawRow, _: Turns) -> Iterator[Draft]:
    image = image_of(row)
    prompt, answer = _last_answer(row, "conversations")
    other, rejected = _last_answer(row, "rejected_conversations")
    if prompt != other:
        raise RefusedRowError(
            "rejected_conversations",
            "different-prompts",
            "rejected_conversations must differ from conversations in the last answer only. Make "
            "their turns equal or remove the row.",
        )
    yield Draft(image, prompt, answer, rejected)


def _last_answer(row: RawRow, name: str) -> tuple[tuple[Message, ...], str]:
    return split_answer(read_turns(row.get(name), name), name)


LLAVA = Layout(
    name="llava",
    summary="image, conversations: LLaVA-Instruct",
    keys=frozenset({"id", "image", "images", "conversations"}),
    matches=_matches_llava,
    drafts=_llava,
)
POVID = Layout(
    name="povid",
    summary="image, conversations, rejected_conversations: POVID",
    keys=LLAVA.keys | {"rejected_conversations"},
    matches=lambda row: {"conversations", "rejected_conversations"} <= row.keys(),
    drafts=_povid,
)
