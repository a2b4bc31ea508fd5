"""Completions that are taken as rejected answers, and those that are not, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from realign.building.acceptance import REASONS, Acceptance, refusal
from realign.building.prompts import COMPLETION_PROMPT, unwrap_completion
from realign.building.similarity import load_similarity
from realign.building.speech import chats, refuses
from realign.data.formats.source_row import SourceRow
from realign.generation.generator import Answer

ANSWER, MASKED = "A red dog sits on it.", "A [MASK] [MASK] sits on it."


def row(answer: str = ANSWER, instruction: str = "What does the image show?") -> SourceRow:
    prompt = ({"role": "user", "content": instruction},)
    return SourceRow("a", "a.png", Path("a.png"), prompt, answer)


def acceptance(**options: Any) -> Acceptance:
    settings = {
        "similarity": load_similarity("lexical"),
        "threshold": 0.95,
        "keep_unmasked": True,
        "special": ("</s>", ""),
    }
    return Acceptance(**(settings | options))


def reason(reply: str | Answer, similarity: float = 0.5, **options: Any) -> str:
    answer = reply if isinstance(reply, Answer) else Answer(reply)
    return refusal(row(), MASKED, answer, similarity, acceptance(**options))


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("", "empty"),
        ("A [MASK] dog sits on it.", "mask left unfilled"),
        ("A [mask] dog sits on it.", "mask left unfilled"),
        ("A [MASK ] dog sits on it.", "mask left unfilled"),
        ("A [MASK_2] dog sits on it.", "mask left unfilled"),
        ("A <mask> dog sits on it.", "mask left unfilled"),
        ("A [blank] dog sits on it.", "mask left unfilled"),
        ("A ____ dog sits on it.", "mask left unfilled"),
        ("A [MASK dog sits on it.", "mask left unfilled"),
        ("[MASKMASKMASK plate sits on it.", "mask left unfilled"),
        ("A [MASKED dog sits on it.", "mask left unfilled"),
        ("A <image> cat sits on it.", "special token"),
        ("A red cat sits on it.</s>", "special token"),
        ("I'm sorry, but I can't assist with that.", "refused to answer"),
        (f"{COMPLETION_PROMPT} A red cat sits on it.", "prompt echo"),
        ("please complete the following sentence: a cat", "prompt echo"),
        ("What does the image show? A cat.", "prompt echo"),
        ("Sure! A red cat sits on it.", "chatter"),
        ("A red dog sits on it.", "identical"),
        ("a red  dog sits on it", "identical"),
        ("The red cat sits on it.", "unmasked words changed"),
        ("A red cat sits on it.", ""),
        ("A masked cat (masked) sits on it.", ""),
    ],
)
def test_a_completion_is_refused_for_the_right_reason(completion: str, why: str) -> None:
    assert reason(completion) == why


def test_problems_reported_by_the_generator_take_precedence() -> None:
    assert reason(Answer("", is_cut=True, problem="status 400")) == "status 400"
    assert reason(Answer("", is_cut=True)) == "cut at max_new_tokens"


def test_similarity_at_the_threshold_is_too_similar() -> None:
    assert reason("A blue cat sits on it.", 0.95) == "too similar"
    assert reason("A blue cat sits on it.", 0.949999) == ""


@pytest.mark.parametrize(
    ("num_words", "why"), [(1, "too few words"), (2, ""), (18, ""), (19, "too many words")]
)
def test_lengths_are_relative_to_the_answer(num_words: int, why: str) -> None:
    """The answer has six words, so the defaults allow two to eighteen."""
    assert reason(" ".join(["cat"] * num_words), keep_unmasked=False) == why


def test_length_ratio_limits_can_be_configured() -> None:
    limits = {"keep_unmasked": False, "min_length_ratio": 1.0, "max_length_ratio": 1.0}
    assert reason("A cat sits on it.", **limits) == "too few words"
    assert reason("A big cat sits on it now.", **limits) == "too many words"
    assert reason("A big cat sits on it.", **limits) == ""


def test_checks_run_in_the_listed_order() -> None:
    """A completion fails every check at first, and its faults are corrected one by one."""
    failing = [
        (Answer("", is_cut=True), 1.0),
        (Answer(""), 1.0),
        (Answer("I'm sorry. Sure! ___ </s> Complete the following sentence."), 1.0),
        (Answer("I'm sorry. Sure! </s> Complete the following sentence."), 1.0),
        (Answer("I'm sorry. Sure! Complete the following sentence."), 1.0),
        (Answer("Sure! Complete the following sentence."), 1.0),
        (Answer("Sure!"), 1.0),
        (Answer(ANSWER), 1.0),
        (Answer("Cat."), 1.0),
    ]
    seen = [refusal(row(), MASKED, answer, value, acceptance()) for answer, value in failing]
    loose = {"keep_unmasked": False}
    seen += [
        reason("Cat.", 1.0, **loose),
        reason("cat " * 19, 1.0, **loose),
        reason("A b", 1.0, **loose),
    ]
    assert tuple(seen) == REASONS
    assert len(set(REASONS)) == len(REASONS)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't see the image.",
        "I’m sorry.",
        "As an AI language model, I have no eyes.",
        "I cannot assist with that request.",
        "I am unable to complete the sentence.",
        "A dog sits. Unfortunately, I cannot fill the rest.",
        "There is no image provided.\n",
        "Please provide the image.",
        "I cannot see the image",
    ],
)
def test_refusals_to_answer_are_recognized(text: str) -> None:
    assert refuses(text, "A dog.")
    assert not refuses(text, text)  # the good answer says the same


@pytest.mark.parametrize(
    "text",
    [
        "I cannot see the dog's face because it looks away.",
        "I can't tell the colour of the hat.",
        "Unfortunately, it rains.",
        "The sign says I'm sorry in red letters.",
        'The child says "I\'m sorry" to the dog.',
        "A sorry sight: as an aid, the dog cannot help the man.",
        "I will not find a cat in it.",
        "I can view the sea.",
        "There is no image of a dog on the wall.",
    ],
)
def test_descriptions_do_not_count_as_refusals(text: str) -> None:
    assert not refuses(text, "A dog.")


def test_talk_about_the_task_is_recognized_as_chatter() -> None:
    assert chats("Certainly! A cat.", "A dog.")
    assert chats("A cat.\nLet me know if you need more.", "A dog.")
    assert not chats("Sure-footed goats climb. Certainly a cat.", "A dog.")
    assert not chats("Of course, there is a cat.", "Of course, there is a dog.")


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("A cat.", "A cat."),
        ("Sure, here is the completed sentence: A cat.", "A cat."),
        ('Here’s the completed description:\n\n"A cat."', "A cat."),
        ("**Completed sentence:** A cat.", "A cat."),
        ("Answer: A cat.", "A cat."),
        ("```\nA cat.\n```", "A cat."),
        ('"A cat."', "A cat."),
        ('"A" and "b"', '"A" and "b"'),
        ("Here are three dogs: one red, two blue.", "Here are three dogs: one red, two blue."),
        ("The full moon rises at 9: it is red.", "The full moon rises at 9: it is red."),
        ("There is one thing: a cat.", "There is one thing: a cat."),
        ("Answer:", "Answer:"),
        ("", ""),
    ],
)
def test_wrapping_is_taken_off_a_completion(completion: str, text: str) -> None:
    assert unwrap_completion(completion, "A dog.") == text


def test_wrapping_shared_with_the_answer_is_kept() -> None:
    assert unwrap_completion('"Stay"', '"Stop"') == '"Stay"'
    assert unwrap_completion("Answer: B", "Answer: A") == "Answer: B"


@pytest.mark.parametrize(
    "text", ["sure " * 4000, "_" * 20000, "[" * 20000, "Here is " * 2500, ": " * 9000]
)
def test_long_completions_are_judged_without_backtracking(text: str) -> None:
    assert reason(unwrap_completion(text, ANSWER), keep_unmasked=False)
