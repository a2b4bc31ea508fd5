"""Words of captions, against what NLTK's tokenizer, pattern's singularize and WordNet gave."""

from __future__ import annotations

import pytest

from realign.evaluation.caption_words import caption_tokens, pattern_singular, wordnet_singular


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog's (red) toy.", "a dog 's ( red ) toy ."),
        ("It isn't a Dog. The cats' bed", "it is n't a dog . the cats ' bed"),
        ("a dog; a **cat**: two/three", "a dog ; a * * cat * * : two/three"),
        ('"The dog." He sat at 3:15, not 2,000', '" the dog . " he sat at 3:15 , not 2,000'),
        ("a motor-bike--fast... v2.0 dog.cat", "a motor-bike -- fast ... v2.0 dog.cat"),
        ("the dog\u2019s bone \u2013 \u201cbig\u201d", "the dog ’ s bone – “ big ”"),
        ("a 'dog' they'll see!", "a ' dog ' they 'll see !"),
        ("A bus.\n\nA car.", "a bus . a car ."),
        ("", ""),
    ],
)
def test_captions_are_cut_into_tokens(caption: str, tokens: str) -> None:
    assert caption_tokens(caption.lower()) == tokens.split()


@pytest.mark.parametrize(
    ("word", "by_pattern", "by_wordnet"),
    [
        ("bus", "bu", "bus"),
        ("buses", "bus", "bus"),
        ("glass", "glas", "glass"),
        ("glasses", "glass", "glass"),
        ("tennis", "tenni", "tennis"),
        ("men", "man", "men"),
        ("women", "woman", "woman"),
        ("policemen", "policeman", "policeman"),
        ("people", "person", "people"),
        ("children", "child", "child"),
        ("canoes", "cano", "canoe"),
        ("buffaloes", "buffalo", "buffalo"),
        ("vases", "vase", "vas"),
        ("knives", "knife", "knife"),
        ("calves", "calf", "calf"),
        ("gloves", "glove", "glove"),
        ("stoves", "stove", "stove"),
        ("locomotives", "locomotive", "locomotive"),
        ("ponies", "pony", "pony"),
        ("trolleys", "trolley", "trolley"),
        ("ties", "ty", "tie"),
        ("collies", "collies", "collie"),
        ("doggies", "doggies", "doggy"),
        ("skis", "ski", "ski"),
        ("mice", "mouse", "mouse"),
        ("geese", "goose", "goose"),
        ("oxen", "ox", "ox"),
        ("scissors", "scissors", "scissors"),
        ("benches", "bench", "bench"),
        ("toothbrushes", "toothbrush", "toothbrush"),
        ("horses", "horse", "horse"),
        ("smartphones", "smartphone", "smartphones"),
        ("firetrucks", "firetruck", "firetrucks"),
        ("pizza", "pizza", "pizza"),
        ("has", "ha", "ha"),
    ],
)
def test_singulars_are_found_by_pattern_and_by_wordnet(
    word: str, by_pattern: str, by_wordnet: str
) -> None:
    assert (pattern_singular(word), wordnet_singular(word)) == (by_pattern, by_wordnet)
