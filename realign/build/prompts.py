"""The paper's two prompts, word for word (arXiv 2502.13146, Appendix A), the token they share, and
our reminders for a mask that changed more than it should.
"""

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


# One a retry, because a model that decodes greedily answers the same request in the same way.
MASK_REMINDERS = (
    "Repeat the description word for word, change nothing but the masked words, and write nothing "
    "before or after it.",
    "Write the description once more. Each word is either copied exactly as it is or replaced by "
    "[MASK]. At least one word is replaced, and most are copied.",
    "Copy the description. Replace only nouns, adjectives and verbs that can be seen in the image "
    "by [MASK]. Keep every other word, every comma and every full stop.",
)


def masking_request(answer: str, retry: int = 0) -> str:
    """What the masking model is asked: the paper's prompt, then the answer.

    Args:
        answer: To be masked.
        retry: 0 for the paper's words alone, n for the n-th reminder between them and the answer.
    """
    reminder = f"\n{MASK_REMINDERS[retry - 1]}" if retry else ""
    return f"{MASK_PROMPT}{reminder}\n{answer}"


def completion_request(instruction: str, masked: str) -> str:
    """What the completing model is asked. The completion is conditioned on the instruction x
    (paper, section 3.1).
    """
    return f"{instruction}\n{COMPLETION_PROMPT}\n{masked}"
