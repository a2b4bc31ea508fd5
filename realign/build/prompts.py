"""The paper's two prompts, word for word (arXiv 2502.13146, Appendix A), and the token they
share.
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


def masking_request(answer: str) -> str:
    """What the masking model is asked: the paper's prompt, then the answer."""
    return f"{MASK_PROMPT}\n{answer}"


def completion_request(instruction: str, masked: str) -> str:
    """What the completing model is asked. The completion is conditioned on the instruction x
    (paper, section 3.1).
    """
    return f"{instruction}\n{COMPLETION_PROMPT}\n{masked}"
