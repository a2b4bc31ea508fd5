"""A row of every layout with both answers, for the tests of all their readers."""

from __future__ import annotations

import json
from typing import Any

from realign.data.formats.text_pairs import VICUNA_SYSTEM


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def parts(role: str, text: str, *, images: int = 0) -> dict[str, Any]:
    image = [{"type": "image", "text": None}] * images
    return {"role": role, "content": [*image, {"type": "text", "text": text}]}


PAIR = {"chosen": "A red car.", "rejected": "A blue car."}
QUESTION = "What is there?"
# name of the layout -> a row of it that asks QUESTION about a.jpg and has PAIR
ROWS: dict[str, dict[str, Any]] = {
    "question": {"image": "a.jpg", "question": f"<image>\n{QUESTION}", **PAIR},
    "rlhf-v": {"image": "a.jpg", "text": json.dumps({"question": QUESTION, **PAIR})},
    "mdpo": {
        "img_path": "a.jpg",
        "prompt": f"{VICUNA_SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:",
        **PAIR,
    },
    "povid": {
        "image": "a.jpg",
        "conversations": [human(f"<image>\n{QUESTION}"), gpt(PAIR["chosen"])],
        "rejected_conversations": [human(f"<image>\n{QUESTION}"), gpt(PAIR["rejected"])],
    },
    "llamafactory": {
        "images": ["a.jpg"],
        "conversations": [human(f"<image>{QUESTION}")],
        "chosen": gpt(PAIR["chosen"]),
        "rejected": gpt(PAIR["rejected"]),
    },
    "ms-swift": {
        "images": ["a.jpg"],
        "messages": [user(f"<image>{QUESTION}"), assistant(PAIR["chosen"])],
        "rejected_response": PAIR["rejected"],
    },
    "trl": {
        "images": ["a.jpg"],
        "prompt": [parts("user", QUESTION, images=1)],
        "chosen": [parts("assistant", PAIR["chosen"])],
        "rejected": [parts("assistant", PAIR["rejected"])],
    },
    "official": {
        "image": "a.jpg",
        "retrieved_image": "b.jpg",
        "chosen": [user(f"<image>\n{QUESTION}"), assistant(PAIR["chosen"])],
        "rejected": [user(f"<image>\n{QUESTION}"), assistant(PAIR["rejected"])],
    },
    "realign": {
        "image": "a.jpg",
        "prompt": QUESTION,
        "answer": PAIR["chosen"],
        "rejected": PAIR["rejected"],
    },
}
