"""Words of captions by NLTK's tokenizer, tagger and WordNet, for the rules of programs that use
these. The user installs NLTK and its data; nothing else requires them.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.metadata import version
from typing import Any

from realign.errors import RefusedError

DATA = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet")
_OLDEST = (3, 9)  # the first version whose data holds no pickles
_PARTS_OF_SPEECH = {"J": "a", "V": "v", "N": "n", "R": "r"}  # the first letter of a tag


def lemmas(caption: str) -> list[str]:
    """Return the lemma of every token of a caption, by the part of speech that NLTK tags it with.

    Raises:
        RefusedError: NLTK or its data is missing.
    """
    nltk, lemmatize = _nltk()
    return [
        lemmatize(word, _PARTS_OF_SPEECH.get(tag[0], "n"))
        for word, tag in nltk.pos_tag(nltk.word_tokenize(caption.lower()))
    ]


def nouns(caption: str) -> list[str]:
    """Return the lemma of every token of a caption that NLTK tags as a noun; case is kept.

    Raises:
        RefusedError: NLTK or its data is missing.
    """
    nltk, lemmatize = _nltk()
    tagged = nltk.pos_tag(nltk.word_tokenize(caption))
    return [lemmatize(word, "n") for word, tag in tagged if tag.startswith("NN")]


@functools.cache
def _nltk() -> tuple[Any, Any]:
    """Return the module and the function that finds lemmas."""
    try:
        nltk: Any = import_module("nltk")
    except ModuleNotFoundError:
        raise RefusedError(
            "This rule requires NLTK, which is not installed. Run pip install nltk and python -m "
            f"nltk.downloader {' '.join(DATA)}, or name a rule that needs no tagger."
        ) from None
    found = version("nltk")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise RefusedError(
            f"nltk must be of version 3.9 or later, whose data holds no pickles, got {found}. Run "
            "pip install --upgrade nltk."
        )
    lemmatize = import_module("nltk.stem").WordNetLemmatizer().lemmatize
    try:
        nltk.pos_tag(nltk.word_tokenize("Two dogs."))
        lemmatize("dogs", "n")
    except LookupError as error:
        name = next((name for name in DATA if name in str(error)), "all of it")
        raise RefusedError(
            f"This rule requires the data of NLTK, of which {name} is missing. Run python -m "
            f"nltk.downloader {' '.join(DATA)}, or name a rule that needs no tagger."
        ) from None
    return nltk, lemmatize
