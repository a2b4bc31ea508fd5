"""Short free answers, compared with those of ten people as VQA, TextVQA and VizWiz do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from realign.evaluation.answer_words import strip_punctuation

_NUMBERS = dict(
    zip(
        [
            "none",
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
        ],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
_ARTICLES = ("a", "an", "the")
# words whose missing apostrophe is restored
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

Normalizer = Callable[[str], str]


def official_form(answer: str) -> str:
    """Return an answer in the form in which the scorer of TextVQA and VizWiz compares it."""
    plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(strip_punctuation(_one_line(plain), keeps_after_digit=False))


def vlmevalkit_form(answer: str) -> str:
    """Return an answer in the form in which VLMEvalKit compares it."""
    return _words(strip_punctuation(_one_line(answer), keeps_after_digit=True))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean over people of min(1, matches among the others / 3).

    Args:
        answer: In the form in which it is compared.
        references: The people's answers, in the same form.
    """
    matches = [reference == answer for reference in references]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)
