"""Rule masking and the checks of what a model returns."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.build.masking import Lexicon, fits_mask, mask_by_rule, masks_only
from realign.build.pipeline import ENGLISH_LEXICON
from realign.build.prompts import COMPLETION_PROMPT, MASK_PROMPT, completion_request
from realign.errors import RefusedError

LEXICON = Lexicon(
    {
        "objects": ["house", "tree", "bus"],
        "attributes": ["red"],
        "relations": ["at the top", "at the top left"],
    }
)


def test_prompts_are_the_papers_word_for_word() -> None:
    assert MASK_PROMPT == (
        "Please mask any words of the segments related to the objects, attributes, and logical "
        "relationships of the input image in the following description by replacing them with "
        "[MASK]."
    )
    assert COMPLETION_PROMPT == (
        "Please complete the following sentence based on the input image by filling in the "
        "masked segments."
    )


def test_completion_request_carries_instruction_prompt_and_masked_answer() -> None:
    request = completion_request("Describe the image.", "A [MASK].")
    assert request == f"Describe the image.\n{COMPLETION_PROMPT}\nA [MASK]."


def test_masks_every_segment_at_rate_one_and_keeps_the_rest() -> None:
    text = "There is a red house at the top left, near two buses. Treehouse!"
    masked = mask_by_rule(text, LEXICON, {}, Random(0))
    assert masked == "There is a [MASK] [MASK] [MASK], near two [MASK]. Treehouse!"


def test_longest_phrase_wins() -> None:
    segments = LEXICON.segments("at the top left")
    assert segments == [(0, 15, "relations")]


def test_rate_zero_still_masks_one_segment() -> None:
    rates = {"objects": 0.0, "attributes": 0.0, "relations": 0.0}
    masked = mask_by_rule("a red house", LEXICON, rates, Random(1))
    assert masked is not None
    assert masked.count("[MASK]") == 1


def test_rates_are_by_category() -> None:
    rates = {"objects": 1.0, "attributes": 0.0, "relations": 0.0}
    masked = mask_by_rule("a red house at the top", LEXICON, rates, Random(0))
    assert masked == "a red [MASK] at the top"


def test_nothing_to_mask_is_none() -> None:
    assert mask_by_rule("Nothing here.", LEXICON, {}, Random(0)) is None


@pytest.mark.parametrize(
    ("completed", "fits"),
    [
        ("There is a red house.", True),
        ("There is a very large blue tree.", True),
        ("There is a red house!", False),  # another character changed
        ("There was a red house.", False),
        ("There is a [MASK] house.", False),  # one left unfilled
        ("There is a .", False),  # nothing filled in
    ],
)
def test_fits_mask(completed: str, fits: bool) -> None:
    assert fits_mask("There is a [MASK] [MASK].", completed) is fits


def test_masks_only_refuses_an_unmasked_and_a_changed_text() -> None:
    assert masks_only("a red house", "a [MASK] house")
    assert not masks_only("a red house", "a red house")
    assert not masks_only("a red house", "the [MASK] house")


@given(
    st.lists(st.sampled_from(["a", "red", "house", "tree", "at the top", "and", ","]), min_size=1)
)
def test_a_rule_mask_always_fits_the_text_it_came_from(words: list[str]) -> None:
    text = " ".join(words)
    masked = mask_by_rule(text, LEXICON, {"objects": 0.5}, Random(0))
    assert masked is None or masks_only(text, masked)


def test_packaged_english_lexicon_masks_the_papers_example() -> None:
    text = "The man and his dog are located on the beach, near the ocean."
    masked = mask_by_rule(text, Lexicon.load(ENGLISH_LEXICON), {}, Random(0))
    assert masked == ("The [MASK] and his [MASK] are located on the [MASK], [MASK] the [MASK].")


def test_a_lexicon_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.yaml"
    path.write_text("- house\n- tree\n")
    with pytest.raises(RefusedError, match="must map each category to a list of phrases, got list"):
        Lexicon.load(path)
