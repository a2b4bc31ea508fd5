"""How alike two answers are, between 0 and 1: words and word pairs offline, sentence-transformers
when named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from realign.errors import RefusedError

Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]

# Words that carry no visual content: articles, auxiliaries, connectives.
FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "the", "is", "are", "was", "were", "be", "been", "being", "there", "and"),
        *("or", "of", "to", "in", "on", "at", "by", "with", "it", "its", "this"),
    ]
)


def lexical(first: str, second: str) -> float:
    """Dice coefficient of the content words and of the pairs of neighbouring ones.

    Equal texts give 1. Pairs make the order count: "red house, blue tree" and "blue house, red
    tree" differ.
    """
    a, b = _features(first), _features(second)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else float(first.strip() == second.strip())


def _features(text: str) -> Counter[tuple[str, ...]]:
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in FUNCTION_WORDS]
    return Counter([(word,) for word in words] + list(pairwise(words)))


def load_similarity(name: str) -> Similarity:
    """Return a similarity by name.

    Args:
        name: ``lexical``, or a sentence-transformers model (hub id or folder) whose cosine is used.
    Raises:
        RefusedError: sentence-transformers is needed and not installed.
    """
    if name == "lexical":
        return lambda first, second: [lexical(a, b) for a, b in zip(first, second, strict=True)]
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise RefusedError(
            f"similarity {name!r} needs sentence-transformers. Install "
            f"'realign[pipeline,similarity]' or use lexical."
        ) from None
    encoder = SentenceTransformer(name)

    def cosine(first: Sequence[str], second: Sequence[str]) -> list[float]:
        options = {
            "convert_to_tensor": True,
            "normalize_embeddings": True,
            "show_progress_bar": False,
        }
        return [
            float(x)
            for x in (
                encoder.encode([*first], **options) * encoder.encode([*second], **options)
            ).sum(1)
        ]

    return cosine
