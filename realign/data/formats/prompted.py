"""Rows with an image, a prompt and possibly an answer: this project's own JSONL, and tables with
these columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from realign.data.formats.conversation import check_prompt, read_turns
from realign.data.formats.layout import (
    Draft,
    Layout,
    RawRow,
    RefusedRowError,
    Turns,
    text_of,
)
from realign.data.records import IMAGE_TOKEN, Message


def _matches(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and bool({"image", "images"} & row.keys()) and "chosen" not in row


def _drafts(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    prompt = _prompt(row, num_images)
    answer = text_of(row, "answer", needed=False)
    rejected = text_of(row, "rejected", needed=False)
    if rejected.strip() and not answer.strip():
        raise RefusedRowError(
            "answer",
            "empty",
            f"answer must not be empty beside rejected {rejected!r:.80}. Fill it in or remove "
            "rejected.",
        )
    yield Draft(prompt, answer, rejected)


def _prompt(row: RawRow, num_images: int) -> tuple[Message, ...]:
    if not isinstance(row.get("prompt"), list):
        return ({"role": "user", "content": text_of(row, "prompt")},)
    if IMAGE_TOKEN in str(row["prompt"]):  # in this layout, the image always comes first
        raise RefusedRowError(
            "prompt",
            "special-token",
            f"prompt must not contain {IMAGE_TOKEN}, got {row['prompt']!r:.80}. Remove it; the "
            "image is put before the prompt automatically.",
        )
    return check_prompt(read_turns(row["prompt"], "prompt", num_images), "prompt")


PROMPTED = Layout(
    name="realign",
    summary="image, prompt, answer, rejected where there is one",
    keys=frozenset({"id", "image", "images", "prompt", "answer", "rejected"}),
    matches=_matches,
    drafts=_drafts,
    ids_repeat=False,
)
