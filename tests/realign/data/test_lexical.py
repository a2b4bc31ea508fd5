"""The lexical similarity against counts by hand, and on any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.data.lexical import lexical


def test_the_similarity_equals_a_count_by_hand() -> None:
    # content words {red, house} and {red, tree}; pairs {red house} and {red tree}: 1 of 3 shared
    assert lexical("a red house", "a red tree") == pytest.approx(2 * 1 / (3 + 3))


def test_the_similarity_depends_on_the_order_of_words() -> None:
    first, second = "a red house and a blue tree", "a blue house and a red tree"
    assert lexical(first, second) < 0.95
    assert lexical(first, first) == 1.0


def test_one_changed_word_of_a_long_caption_is_below_the_papers_threshold() -> None:
    caption = (
        "There is a red house at the top left, a green tree at the bottom, a blue boat in the "
        "middle and a black fish on the right."
    )
    assert lexical(caption, caption.replace("boat", "star")) < 0.95


def test_texts_without_content_words_are_compared_exactly() -> None:
    assert lexical("It is.", "It is.") == 1.0
    assert lexical("It is.", "Is it?") == 0.0


@given(st.text(), st.text())
def test_the_similarity_is_symmetric_and_between_zero_and_one(first: str, second: str) -> None:
    assert 0.0 <= lexical(first, second) <= 1.0
    assert lexical(first, second) == lexical(second, first)
