"""Pairs of plain texts: a question with a chosen and a rejected answer (RLAIF-V, SPA-VL, MMPR), the
same in one JSON string (RLHF-V), or with a prompt that is already templated (mDPO).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from realign.data.formats.conversation import without_placeholders
from realign.data.formats.layout import (
    Draft,
    Layout,
    RawRow,
    RefusedRowError,
    Turns,
    images_of,
    text_of,
)
from realign.data.records import Message

PAIR = {"question", "chosen", "rejected"}
# The first sentence of Vicuna's template, which mDPO's published rows contain.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
TEMPLATE = re.compile(
    rf"(?:{re.escape(VICUNA_SYSTEM)}\s+)?USER:\s*(?P<question>.+?)\s*ASSISTANT:\s*", re.DOTALL
)


def _question(text: str, name: str, num_images: int) -> tuple[Message, ...]:
    question = without_placeholders(text, name, num_images)
    if not question:
        raise RefusedRowError(
            name, "empty", f"{name} must not be empty, got {text!r}. Fill it in or remove the row."
        )
    return ({"role": "user", "content": question},)


def _pair(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    prompt = _question(text_of(row, "question"), "question", num_images)
    yield Draft(prompt, text_of(row, "chosen"), text_of(row, "rejected"))


def _rlhf_v(row: RawRow, turns: Turns, num_images: int) -> Iterator[Draft]:
    text = row.get("text")
    try:
        pair = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):  # no JSON, too many digits, too many brackets
        pair = None
    if not isinstance(pair, dict) or not pair.keys() >= PAIR:
        raise RefusedRowError(
            "text",
            "wrong-type",
            f"text must be a JSON object with {sorted(PAIR)}, got {text!r:.80}. Correct it or "
            "remove the row.",
        )
    yield from _pair(pair, turns, num_images)


def _mdpo(row: RawRow, _: Turns, num_images: int) -> Iterator[Draft]:
    prompt = text_of(row, "prompt").strip()
    found = TEMPLATE.fullmatch(prompt)
    question = found["question"] if found else ""
    if not found or any(word in question for word in ("USER:", "ASSISTANT:", "</s>")):
        raise RefusedRowError(
            "prompt",
            "template",
            f"prompt must be 'USER: question ASSISTANT:' with at most Vicuna's system sentence "
            f"before it, got {prompt!r:.80}. Correct it or remove the row; if all rows have "
            "another template, put each question alone into question and its image into image.",
        )
    asked = _question(question, "prompt", num_images)
    yield Draft(asked, text_of(row, "chosen"), text_of(row, "rejected"))


def _has_image(row: Mapping[str, Any]) -> bool:
    return bool({"image", "images"} & row.keys())


QUESTION = Layout(
    name="question",
    summary="image, question, chosen, rejected: RLAIF-V, SPA-VL, MMPR",
    keys=frozenset({"id", "image", "images", *PAIR}),
    matches=lambda row: row.keys() >= PAIR and _has_image(row),
    drafts=_pair,
)
RLHF_V = Layout(
    name="rlhf-v",
    summary="image, text with question, chosen, rejected: RLHF-V",
    keys=frozenset({"id", "image", "images", "text"}),
    matches=lambda row: "text" in row and _has_image(row) and not {"prompt", *PAIR} & row.keys(),
    drafts=_rlhf_v,
)
MDPO = Layout(
    name="mdpo",
    summary="img_path, prompt as a finished template, chosen, rejected: mDPO",
    keys=frozenset({"id", "img_path", "prompt", "chosen", "rejected"}),
    matches=lambda row: "img_path" in row and "prompt" in row,
    drafts=_mdpo,
    images=lambda row: images_of({"image": row.get("img_path")}),
)
