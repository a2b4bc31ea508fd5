"""The rules that need NLTK, with a stand-in for it that tags words as a test asks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from realign.errors import RefusedError
from realign.evaluation import nltk_words

PACKAGE = """
def word_tokenize(text):
    return text.split()

def pos_tag(words):
    tags = {"seated": "VBN", "men": "NNS", "Dogs": "NNS", "quickly": "RB", "better": "JJR"}
    return [(word, tags.get(word, "DT")) for word in words]
"""
STEM = """
class WordNetLemmatizer:
    def lemmatize(self, word, part):
        if word == "dogs" and FAILS:
            raise LookupError("Resource wordnet not found.")
        return f"{word}-{part}"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that puts a package called nltk on the path."""

    def install(version: str, *, has_data: bool = True) -> None:
        folder = tmp_path / "nltk"
        folder.mkdir()
        (folder / "__init__.py").write_text(PACKAGE)
        (folder / "stem.py").write_text(STEM.replace("FAILS", str(not has_data)))
        (tmp_path / f"nltk-{version}.dist-info").mkdir()
        (tmp_path / f"nltk-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: nltk\nVersion: {version}\n"
        )

    for name in [name for name in sys.modules if name.split(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    nltk_words._nltk.cache_clear()
    yield install
    nltk_words._nltk.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "nltk"]:
        del sys.modules[name]


def test_lemmas_follow_the_tags(install: Callable[..., None]) -> None:
    install("3.10.1")
    assert nltk_words.lemmas("Men seated quickly better the") == [
        "men-n",
        "seated-v",
        "quickly-r",
        "better-a",
        "the-n",
    ]
    assert nltk_words.nouns("the Dogs seated men") == ["Dogs-n", "men-n"]


def test_missing_nltk_and_missing_data_are_refused_by_name(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("3.10.1", has_data=False)
    with pytest.raises(RefusedError, match=r"data of NLTK, of which wordnet is missing\. Run"):
        nltk_words.lemmas("x")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(RefusedError, match=r"requires NLTK, .*pip install nltk and python -m nltk"):
        nltk_words.nouns("x")


def test_versions_whose_data_holds_pickles_are_refused(install: Callable[..., None]) -> None:
    install("3.8.1")
    with pytest.raises(RefusedError, match=r"nltk must be of version 3\.9 or later.*got 3\.8\.1"):
        nltk_words.lemmas("x")
