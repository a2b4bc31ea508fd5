"""What a word is, wherever words are masked, matched or counted."""

from __future__ import annotations

import re

_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"  # Japanese and Chinese write no spaces
# a letter and the accents written after it belong together; an unspaced character is a word
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[\u0300-\u036f]+[^\W{_UNSPACED}]*)*")
