"""Conversations between ``human`` and ``gpt`` about one image: LLaVA-Instruct-150K, and POVID with
a second conversation whose last answer is the rejected one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from realign.data.formats.conversation import check_prompt, read_turns, same_turns, split_answer
from realign.data.formats.layout import Draft, Layout, RawRow, RefusedRowError, Turns
from realign.data.records import Message


def _matches_llava(row: Mapping[str, Any]) -> bool:
    return "conversations" in row and not {"chosen", "rejected_conversations"} & row.keys()


def _llava(row: RawRow, turns: Turns, num_images: int) -> Iterator[Draft]:
    conversation = read_turns(row.get("conversations"), "conversations", num_images)
    if len(conversation) == 1:  # a question alone
        yield Draft(check_prompt(conversation, "conversations"))
        return
    split_answer(conversation, "conversations")
    answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
    picked = {"first": answers[:1], "last": answers[-1:], "each": answers}[turns]
    for i in picked:
        if not conversation[i]["content"].strip():
            raise RefusedRowError(
                "conversations",
                "empty",
                f"conversations must have no empty answer, got one as turn {i + 1}. Fill it in or "
                "remove the row.",
            )
        yield Draft(
            tuple(conversation[:i]),
            conversation[i]["content"],
            turn=answers.index(i) + 1,
        )


def _povid(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    prompt, answer = _last_answer(row, "conversations", num_images)
    other, rejected = _last_answer(row, "rejected_conversations", num_images)
    if not same_turns(prompt, other):
        raise RefusedRowError(
            "rejected_conversations",
            "different-prompts",
            "rejected_conversations must differ from conversations in the last answer only. Make "
            "their turns equal or remove the row.",
        )
    yield Draft(prompt, answer, rejected)


def _last_answer(row: RawRow, name: str, num_images: int) -> tuple[tuple[Message, ...], str]:
    return split_answer(read_turns(row.get(name), name, num_images), name)


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
