"""The words of a caption, as programs that score captions take them: tokens of the Penn Treebank,
and the singular that each of two programs makes of a plural.

Only steps that can change the objects of a caption follow those programs: a token with anything but
letters names no object, so it may be cut in another way here.
"""

from __future__ import annotations

import functools
import re

# a mark that is a token of its own wherever it stands
_MARK = re.compile(r"[;@#$%&?!*\[\](){}<>\"`«»“”‘’„\u2012-\u2015]|--|\.{2,}|''|[:,](?!\d)")
# a period that ends a sentence, perhaps within quotation marks or brackets
_LAST_PERIOD = re.compile(r"(?<!\.)\.(?=[\])}>\"'»”’;*:@({\[‘“«?!]|\s|\Z)")
_OPENING = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE)
_CLITIC = re.compile(r"(?<=[^\s'])('(?:s|m|d|ll|re|ve)?|n't)(?=\s|\Z)", re.IGNORECASE)


def caption_tokens(caption: str) -> list[str]:
    """Return the tokens of a text, punctuation among them.

    A sentence ends at a period before a space, except where the period is that of an abbreviation;
    no object is abbreviated so.

    Example::

        >>> caption_tokens("A dog's (red) toy, near the bus.")
        ['A', 'dog', "'s", '(', 'red', ')', 'toy', ',', 'near', 'the', 'bus', '.']
    """
    text = _OPENING.sub(r" ' ", caption)
    text = _LAST_PERIOD.sub(" . ", text)
    text = _MARK.sub(r" \g<0> ", text)
    return _CLITIC.sub(r" \1", text).split()


_IRREGULAR = {
    "people": "person",
    "children": "child",
    "men": "man",
    "geese": "goose",
    "oxen": "ox",
    "kine": "cow",
    "mice": "mouse",
    # a class of letters is written where one of them is meant
    "|ice": "|ouse",
}
# plurals that stay as they are
_UNCHANGED = frozenset({"scissors", "doggies", "collies"})
_VES = {"l": "f", "r": "f", "a": "ve", "e": "ve", "o": "ve"}  # the letter before -ves


@functools.lru_cache(maxsize=1 << 16)
def pattern_singular(word: str) -> str:
    """Return the singular that the library pattern makes of a word in small letters, faults
    included: ``bus`` becomes ``bu``, ``glass`` becomes ``glas`` and ``canoes`` becomes ``cano``.

    It is the same for all forms of the words of CHAIR's objects; of other words, those of Greek and
    Latin form above all, pattern knows more.

    Example::

        >>> [pattern_singular(word) for word in ("women", "knives", "buses", "bus")]
        ['woman', 'knife', 'bus', 'bu']
    """
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    if word.endswith("ae"):
        return word[:-1]
    if not word.endswith("s") or word in _UNCHANGED:
        return word
    if re.search(r"([^aeiouy]|qu)ies\Z", word):
        return word[:-3] + "y"
    if word.endswith("ves") and not word.endswith(("tives", "sives")):
        return word[:-3] + _VES.get(word[-4:-3], "fe")
    if re.search(r"(o|x|ch|ss|sh|bus)es\Z", word):
        return word[:-2]
    return word[:-1]


# words of the objects of CHAIR and AMBER that WordNet lacks as nouns, so that their plurals stay
_LACKING = """
TV air-conditioning baconic bedsheet biker bluejay brindle cann cathole closestool cooktop coworker
doghole e-book earing ebook electrombile firetruck hairdryer hot kiwifruit lenovo longboard macbook
netbook paddleboat paraglider pissoir pitbull riverboat rpoe sailboard sanitizer scoon seegull
shortboard showerpuff skimboard smartphone solider stovetop streetlamp teddybear televison waterfont
"""
_NOT_IN_WORDNET = frozenset(_LACKING.split())
_LEMMAS = {
    "children": "child",
    "grandchildren": "grandchild",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
    "calves": "calf",
    "knives": "knife",
    "pocketknives": "pocketknife",
    "thieves": "thief",
    "scarves": "scarf",
    "leaves": "leaf",
    "buffaloes": "buffalo",
    "flamingoes": "flamingo",
    "potatoes": "potato",
    "tomatoes": "tomato",
    "taxies": "taxi",
    "zebus": "zebu",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
    "busses": "bus",
    # the shortest noun that it could be is a vessel of the body
    "vases": "vas",
    # nouns that have no singular
    **{word: word for word in ("glas", "men", "scissors", "tennis")},
    **{word: word[:-1] for word in ("collies", "magpies", "neckties", "ties")},
}
_NOUN_ENDINGS = {"men": "man", "ies": "y", "xes": "x", "ches": "ch", "shes": "sh"}


@functools.lru_cache(maxsize=1 << 16)
def wordnet_singular(word: str) -> str:
    """Return the lemma that NLTK finds in WordNet for a noun, faults included: ``men`` and
    ``vases`` are no plurals of man and vase, and the plural of a word that WordNet lacks stays.

    It is the same for all forms of the words of CHAIR's and AMBER's objects.

    Example::

        >>> [wordnet_singular(word) for word in ("women", "men", "knives", "buses", "bus")]
        ['woman', 'men', 'knife', 'bus', 'bus']
    """
    if word in _LEMMAS:
        return _LEMMAS[word]
    for ending, singular in _NOUN_ENDINGS.items():
        if word.endswith(ending):
            return word.removesuffix(ending) + singular
    if re.search(r"(bus|ss)es\Z", word):
        return word[:-2]
    is_plural = word.endswith("s") and not word.endswith(("ss", "us"))
    return word[:-1] if is_plural and word[:-1] not in _NOT_IN_WORDNET else word
