"""Masking by rule and by a model's reply, at both levels, and the choice between the two."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.building.masking.lexicon import Lexicon
from realign.building.masking.masker import BY_MODEL, Masked, MaskRules, mask_rows
from realign.building.masking.masks import fits_mask, mask_by_reply, mask_by_rule
from realign.building.masking.sentences import sentences
from realign.building.prompts import (
    COMPLETION_PROMPT,
    MASK_PROMPT,
    MASK_REMINDERS,
    completion_request,
    masking_request,
)
from realign.data.formats.source_row import SourceRow
from realign.generation.generator import Answer, Request

LEXICON = Lexicon(
    {
        "objects": ["house", "tree", "bus"],
        "attributes": ["red"],
        "relations": ["at the top", "at the top left"],
    }
)


def test_prompts_equal_those_of_the_paper() -> None:
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


def test_rate_one_masks_every_segment_and_keeps_the_rest() -> None:
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


def test_mask_rates_apply_per_category() -> None:
    rates = {"objects": 1.0, "attributes": 0.0, "relations": 0.0}
    masked = mask_by_rule("a red house at the top", LEXICON, rates, Random(0))
    assert masked == "a red [MASK] at the top"


def test_a_text_without_anything_to_mask_gives_none() -> None:
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
def test_completions_fit_a_mask_when_they_keep_its_other_words(completed: str, fits: bool) -> None:
    assert fits_mask("There is a [MASK] [MASK].", completed) is fits


def masks_only(text: str, masked: str) -> bool:
    """Return whether ``masked`` is ``text`` with at least one stretch replaced and nothing else."""
    pattern = ".+?".join(map(re.escape, masked.split("[MASK]")))
    return "[MASK]" in masked and re.fullmatch(pattern, text, re.DOTALL) is not None


@given(
    st.lists(st.sampled_from(["a", "red", "house", "tree", "at the top", "and", ","]), min_size=1)
)
def test_a_rule_mask_always_fits_its_own_text(words: list[str]) -> None:
    text = " ".join(words)
    masked = mask_by_rule(text, LEXICON, {"objects": 0.5}, Random(0))
    assert masked is None or masks_only(text, masked)


# A model's reply, and the masked answer made of it; None where it cannot be taken.
ANSWER = "A small dog sits on the couch. Its owner's red hat lies nearby."
TAKEN = {
    "as asked": ("A small [MASK] sits on the [MASK]. Its owner's red [MASK] lies nearby.",) * 2,
    "several words under one mask": (
        "A [MASK] sits on the couch. Its owner's [MASK] lies nearby.",
        "A [MASK] sits on the couch. Its owner's [MASK] lies nearby.",
    ),
    "masks side by side": (
        "A [MASK][MASK] sits on the couch. Its owner's red hat lies nearby.",
        "A [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "a mask a word": (
        "A [MASK] [MASK] sits on the couch. Its owner's red hat lies nearby.",
        "A [MASK] [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "more masks than words": (
        "A small [MASK] [MASK] [MASK] sits on the couch. Its owner's red hat lies nearby.",
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "inside a word": (
        "A small d[MASK]g sits on the cou[MASK]. Its owner's red [MASK]t lies nearby.",
        "A small [MASK] sits on the [MASK]. Its owner's red [MASK] lies nearby.",
    ),
    "two masks in one word": (
        "A small dog sits on the [MASK]u[MASK]. Its owner's red hat lies nearby.",
        "A small dog sits on the [MASK]. Its owner's red hat lies nearby.",
    ),
    "the full stop too": (
        "A small dog sits on the couch. Its owner's red hat lies [MASK]",
        "A small dog sits on the couch. Its owner's red hat lies [MASK].",
    ),
    "a genitive": (
        "A small dog sits on the couch. Its [MASK]'s red hat lies nearby.",
        "A small dog sits on the couch. Its [MASK]'s red hat lies nearby.",
    ),
    "a label and quotation marks": (
        "Sure! Here is the masked description:\n\n\"A small [MASK] sits on the couch. Its owner's "
        'red hat lies nearby."',
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "a bold label": (
        "**Masked text:** A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "a code fence": (
        "```text\nA small [MASK] sits on the couch. Its owner's red hat lies nearby.\n```",
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
    "bold masks": (
        "A small **[MASK]** sits on the `[MASK]`. Its owner's red hat lies nearby.",
        "A small [MASK] sits on the [MASK]. Its owner's red hat lies nearby.",
    ),
    "other spellings of the token": (
        "A small [mask] sits on the \\[MASK\\]. Its owner's red [ MASK ] lies nearby.",
        "A small [MASK] sits on the [MASK]. Its owner's red [MASK] lies nearby.",
    ),
    "line ends and quotation marks": (
        "A small [MASK] sits on the couch.\nIts owner’s red  hat lies nearby.\n",
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    ),
}
REFUSED = {
    "nothing masked": ANSWER,
    "a word changed": "A tiny [MASK] sits on the couch. Its owner's red hat lies nearby.",
    "a word added": "A small [MASK] is sits on the couch. Its owner's red hat lies nearby.",
    "a word dropped": "A [MASK] sits on couch. Its owner's red hat lies nearby.",
    "another case": "a small [MASK] sits on the couch. Its owner's red hat lies nearby.",
    "a remark after it": (
        "A small [MASK] sits on the couch. Its owner's red hat lies nearby.\n\nNote: I masked one."
    ),
    "everything masked": "[MASK]",
    "every word masked": "[MASK]. [MASK].",
    "across sentences": "A small dog sits on the [MASK] red hat lies nearby.",
    "only a full stop masked": ANSWER.replace(".", "[MASK]", 1),
    "empty": "",
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_reply_that_keeps_every_other_word_is_accepted(name: str) -> None:
    reply, masked = TAKEN[name]
    assert mask_by_reply(ANSWER, reply) == masked
    assert masks_only(ANSWER, masked)


@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_that_changes_unmasked_words_is_refused(name: str) -> None:
    assert mask_by_reply(ANSWER, REFUSED[name]) is None


@pytest.mark.parametrize(
    ("answer", "reply", "masked"),
    [
        ("Yes.", "[MASK].", "[MASK]."),
        ("A dog.", "[MASK]", "[MASK]."),
        ("Three red dogs sit.", "[MASK]", None),
        ('"Stop", says the sign.', '"[MASK]", says the [MASK].', '"[MASK]", says the [MASK].'),
        ("- a dog\n- two cats", "- a [MASK]\n- [MASK] cats", "- a [MASK]\n- [MASK] cats"),
        ("- a dog\n- two cats", "- a dog\n[MASK]", "- a dog\n- [MASK]"),
        ("1. A dog\n2. A cat", "1. A [MASK]\n2. A [MASK]", "1. A [MASK]\n2. A [MASK]"),
        ("Ein Löwe schläft.", "Ein [MASK] schläft.", "Ein [MASK] schläft."),
        ("一只狗坐着。", "一只[MASK]坐着。", "一只[MASK]坐着。"),
        ("The [MASK] token.", "The [MASK] [MASK].", None),
    ],
)
def test_masks_from_replies_equal_masks_made_by_hand(
    answer: str, reply: str, masked: str | None
) -> None:
    assert mask_by_reply(answer, reply) == masked


@given(st.data())
def test_unmasked_text_of_any_reply_equals_the_answer(data: st.DataObject) -> None:
    words = st.sampled_from(
        ["a", "dog", "sits.", "on", "'s", "the\n", "- ", "“red”", "é", "[", "…"]
    )
    text = " ".join(data.draw(st.lists(words, min_size=1, max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6).map(sorted))
    reply = text[: cuts[0]] + "[MASK]".join(text[a:b] for a, b in pairwise(cuts))
    reply += "[MASK]" + text[cuts[-1] :]
    for candidate in (reply, text):
        for level in ("segment", "sentence"):
            masked = mask_by_reply(text, candidate, level)
            assert masked is None or masks_only(text, masked)


@pytest.mark.parametrize(
    "text",
    [
        *("a" * 20000, "red " * 5000, "." * 20000, "\n" * 20000, '"' * 20000, "word: " * 3500),
        *("a.\n" * 7000, "`" * 20000, "*" * 20000, "[MASK " * 3500, "[" * 20000, "_ " * 10000),
    ],
)
@pytest.mark.parametrize("level", ["segment", "sentence"])
def test_long_replies_are_read_without_backtracking(text: str, level) -> None:
    """A search that backtracks would not end here."""
    mask_by_reply(text, text.replace(" ", " [MASK] "), level)
    mask_by_reply(text, text[:-1] + "[MASK]", level)
    mask_by_rule(text, LEXICON, {}, Random(0), level)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A dog. A cat!", ["A dog", "A cat"]),
        (
            "Mr. Smith met J. Doe at 3.5 p.m. on a hill.",
            ["Mr. Smith met J. Doe at 3.5 p.m. on a hill"],
        ),
        ('He says "stop." Then (maybe) he goes...', ['He says "stop', "Then (maybe) he goes"]),
        ("- a dog\n* a cat\n1. A cow\n\n2) a pig", ["a dog", "a cat", "A cow", "a pig"]),
        ("一只狗。两只猫！", ["一只狗", "两只猫"]),
        ("  \n. ! \n", []),
    ],
)
def test_a_text_is_cut_into_sentences(text: str, parts: list[str]) -> None:
    assert [text[start:stop] for start, stop in sentences(text)] == parts


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("A red house. It is nice. A bus!", "[MASK]. It is nice. [MASK]!"),
        ("A red house.", "[MASK]."),
        # all of several would go: the first stays, so that there is something to complete
        ("A red house. A tree. A bus.", "A red house. [MASK]. [MASK]."),
        ("1. A house.\n2. A tree.", "1. A house.\n2. [MASK]."),
        ("Here:\n- a house\n- some words", "Here:\n- [MASK]\n- some words"),
        ("Nothing. At all.", None),
    ],
)
def test_sentence_level_masks_each_sentence_with_visual_words(
    text: str, masked: str | None
) -> None:
    assert mask_by_rule(text, LEXICON, {}, Random(0), "sentence") == masked
    assert masked is None or masks_only(text, masked)


def test_sentence_level_widens_the_masks_of_a_model() -> None:
    reply = "A small [MASK] sits on the couch. Its owner's red hat lies nearby."
    assert mask_by_reply(ANSWER, reply, "sentence") == "[MASK]. Its owner's red hat lies nearby."
    across = "A small dog sits on the [MASK] red hat lies nearby."
    assert mask_by_reply(ANSWER, across, "sentence") == (
        "A small dog sits on the couch. [MASK]."  # both, of which the first stays
    )


def test_sentence_level_rates_apply_to_segments() -> None:
    rates = {"objects": 0.0, "attributes": 1.0}
    text = "A red thing. A house. Nothing."
    assert mask_by_rule(text, LEXICON, rates, Random(0), "sentence") == "[MASK]. A house. Nothing."


def test_an_answer_that_contains_a_mask_token_is_not_masked() -> None:
    assert mask_by_rule("A [MASK] house.", LEXICON, {}, Random(0)) is None


class Replying:
    """A masking model with one list of replies a row; notes what it was asked."""

    def __init__(self, **replies: list[Answer | str]) -> None:
        self.replies, self.asked = replies, []

    def __call__(self, requests: list[Request]) -> list[Answer]:
        self.asked.append([request.prompt for request in requests])
        replies = [self.replies[request.image.stem].pop(0) for request in requests]
        return [Answer(reply) if isinstance(reply, str) else reply for reply in replies]


def row(name: str, answer: str = "A red house.", rejected: str = "") -> SourceRow:
    prompt = ({"role": "user", "content": "What?"},)
    return SourceRow(name, f"{name}.png", Path(f"{name}.png"), prompt, answer, rejected)


def always(prompt: str, image: Path) -> bool:
    return True


def by_model(retries: int, level="segment") -> MaskRules:
    return MaskRules("model", LEXICON, {}, seed=0, level=level, retries=retries)


def test_masks_name_the_model_the_retry_or_the_rule_that_made_them() -> None:
    """Each row covers one way in which a mask can be made."""
    model = Replying(
        first=["A red [MASK]."],
        second=["One red [MASK].", "A [MASK] house."],
        third=["", Answer("A [MASK] house.", is_cut=True), "A [MASK]."],
        never=["No.", Answer("", problem="refused"), "The [MASK]"],
        none=["x", "y", "z"],
    )
    rows = [row("first"), row("second"), row("third"), row("never"), row("none", "Nothing."),
            row("pair", rejected="A bad answer.")]  # fmt: skip
    assert mask_rows(rows, by_model(2), model, always) == [
        Masked("A red [MASK].", "model"),
        Masked("A [MASK] house.", "model, 2nd try"),
        Masked("A [MASK].", "model, 3rd try"),
        Masked("A [MASK] [MASK].", "rule after model"),
        Masked("", "rule after model"),
        Masked("", ""),
    ]
    assert model.asked == [
        [f"{MASK_PROMPT}\nA red house."] * 4 + [f"{MASK_PROMPT}\nNothing."],
        [f"{MASK_PROMPT}\n{MASK_REMINDERS[0]}\nA red house."] * 3
        + [f"{MASK_PROMPT}\n{MASK_REMINDERS[0]}\nNothing."],
        [f"{MASK_PROMPT}\n{MASK_REMINDERS[1]}\nA red house."] * 2
        + [f"{MASK_PROMPT}\n{MASK_REMINDERS[1]}\nNothing."],
    ]
    assert mask_rows([row("a")], MaskRules("rule", LEXICON, {}, 0), None, always) == [
        Masked("A [MASK] [MASK].", "rule")
    ]


def test_zero_retries_query_the_model_once() -> None:
    model = Replying(a=["No."])
    assert mask_rows([row("a")], by_model(0), model, always)[0].by == "rule after model"
    assert len(model.asked) == 1


def test_prompts_too_long_for_the_model_are_not_sent_to_it() -> None:
    model = Replying(a=["No."])
    short = len(masking_request("A red house."))
    masked = mask_rows([row("a")], by_model(3), model, lambda prompt, image: len(prompt) <= short)
    assert masked[0].by == "rule after model"
    assert len(model.asked) == 1


def test_sentence_level_widens_a_model_mask_to_its_sentence() -> None:
    model = Replying(a=["A red [MASK]. It is nice."])
    rows = [row("a", "A red house. It is nice.")]
    assert mask_rows(rows, by_model(1, "sentence"), model, always) == [
        Masked("[MASK]. It is nice.", "model")
    ]


def test_masks_do_not_depend_on_other_rows() -> None:
    rows = [row(str(i), "A red house near a tree, a bus and a house.") for i in range(12)]
    rates = MaskRules("rule", LEXICON, {"objects": 0.5}, seed=3)
    together = mask_rows(rows, rates, None, always)
    assert len({masked.text for masked in together}) > 3
    assert [mask_rows([one], rates, None, always)[0] for one in rows] == together


def test_each_retry_has_its_own_reminder() -> None:
    assert len(BY_MODEL) == len(MASK_REMINDERS) + 1 == len(set(BY_MODEL))
    assert len({masking_request("x", retry) for retry in range(len(BY_MODEL))}) == len(BY_MODEL)
    for retries in (-1, 4):
        with pytest.raises(ValueError, match=r"retries must be in \[0, 3\], one per reminder, got"):
            by_model(retries)
