"""The paper's two prompts, word for word (arXiv 2502.13146, Appendix A), the reading of replies,
and our own reminders for a masking model that changed other words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MASK_TOKEN = "[MASK]"
MASK_PROMPT = (
    "Please mask any words of the segments related to the objects, attributes, and logical "
    "relationships of the "
    "input image in the following description by replacing them with [MASK]."
)
COMPLETION_PROMPT = (
    "Please complete the following sentence based on the input image by filling in the masked "
    "segments."
)
# One per retry, because a model that decodes greedily answers the same request in the same way.
MASK_REMINDERS = (
    "Repeat the description word for word, change nothing but the masked words, and write nothing "
    "before or after it.",
    "Write the description once more. Each word is either copied exactly as it is or replaced by "
    "[MASK]. At least one word is replaced, and most are copied.",
    "Copy the description. Replace only nouns, adjectives and verbs that can be seen in the image "
    "by [MASK]. Keep every other word, every comma and every full stop.",
)
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "`": "`", "«": "»"}
_MASK = re.compile(r"\\?\[\s{0,3}mask(?:ed)?\s{0,3}\\?\]", re.IGNORECASE)
_EMPHASISED = re.compile(r"(\*{1,3}|`|_{1,2})\[MASK\]\1")
_MASKS = re.compile(r"\[MASK\](?:\s*\[MASK\])+")
_LABEL = re.compile(r"[^:\n]{1,100}:[*_\s]+")
_TEXT = r"(?:sentence|description|answer|caption|text|version|response|completion)"
# such as "Sure, here is the completed sentence:" and, in bold, "Completed description:"
_KNOWN_LABEL = re.compile(
    r"[*_#\s]{0,8}"
    r"(?:(?:sure|certainly|of course|okay|absolutely)\b[^\w\n:]{0,3})?"
    rf"(?:here(?:'s|’s| is| are)[^:\n]{{0,40}}\b{_TEXT}\b[^:\n]{{0,40}}"
    r"|(?:the )?(?:completed?|filled(?:[- ]in)?|full|final|revised|masked)"
    rf" {_TEXT}\b[^:\n]{{0,40}}"
    rf"|(?:the )?{_TEXT})"
    r"[*_]{0,3}:[*_\s]+",
    re.IGNORECASE,
)


def masking_request(answer: str, retry: int = 0) -> str:
    """Return the prompt of the masking model: the paper's prompt, then the answer.

    Args:
        answer: The answer to be masked.
        retry: 0 for the paper's prompt alone; n adds the n-th reminder before the answer.
    """
    reminder = f"\n{MASK_REMINDERS[retry - 1]}" if retry else ""
    return f"{MASK_PROMPT}{reminder}\n{answer}"


def completion_request(instruction: str, masked: str) -> str:
    """Return the prompt of the completing model. The completion is conditioned on the instruction x
    (paper, section 3.1).
    """
    return f"{instruction}\n{COMPLETION_PROMPT}\n{masked}"


def readings(reply: str) -> Iterator[str]:
    """Yield the possible readings of a masking reply, the most literal first."""
    text = _MASK.sub(MASK_TOKEN, reply.strip())
    for unwrapped in _unwrapped(text, _LABEL):
        plain = _EMPHASISED.sub(MASK_TOKEN, unwrapped)
        yield from dict.fromkeys((unwrapped, plain, _MASKS.sub(MASK_TOKEN, plain)))


def unwrap_completion(completion: str, answer: str) -> str:
    """Return a completion without a known label, quotation marks or a code fence, unless the answer
    has them too.
    """
    *_, text = [completion.strip(), *_unwrapped(completion.strip(), _KNOWN_LABEL, like=answer)]
    return text


def _unwrapped(text: str, label: re.Pattern[str], like: str = "") -> Iterator[str]:
    """Yield ``text``, then the same without its outermost wrapping, and so on.

    A wrapping that ``like`` has too is not removed.
    """
    yield text
    for _ in range(4):  # a label, a fence, a label in it, quotation marks
        match = label.match(text)
        if match and MASK_TOKEN not in match.group() and not label.match(like):
            inner = text[match.end() :]
        elif _is_fenced(text) and not _is_fenced(like):
            inner = text[text.index("\n") : -3]
        elif _is_quoted(text) and not _is_quoted(like):
            inner = text[1:-1]
        else:
            return
        if not inner.strip():
            return
        text = inner.strip()
        yield text


def _is_fenced(text: str) -> bool:
    return text.startswith("```") and text.endswith("```") and "\n" in text and len(text) > 6


def _is_quoted(text: str) -> bool:
    """Return whether a text as a whole is one quotation."""
    closing = _QUOTES.get(text[:1])
    return bool(closing) and len(text) > 2 and text.find(closing or "", 1) == len(text) - 1
