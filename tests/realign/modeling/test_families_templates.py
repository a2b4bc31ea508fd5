"""The parts of a conversation that are read and scored, with the template of every family."""

from __future__ import annotations

import pytest

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.families import image_token_id
from tests.realign.modeling.families.family import Family
from tests.realign.modeling.families.pairs import SQUARE, TALL, WIDE
from tests.realign.modeling.families.registry import FAMILIES, SEPARATE

EARLIER = (
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is a boat."},
    {"role": "user", "content": "Is it red?"},
)
END = {"gemma-3": "<end_of_turn>"}


def tokens(family: Family, record: Record, *, shared: bool = True) -> tuple[str, list[str]]:
    """Return the whole text that is read, and the scored text of each of three cells."""
    decode = family.processor.tokenizer.decode
    batch = PreferenceCollator(family.processor, 3, shared_prefix=shared)([record])
    ids, labels = batch["sequence_ids"], batch["answer_labels"]
    return decode(batch["input_ids"][0]), [decode(labels[ids == cell]) for cell in range(3)]


@pytest.mark.parametrize("name", [*FAMILIES, *SEPARATE])
def test_only_the_answer_and_its_end_of_turn_are_scored(name: str) -> None:
    family = {**FAMILIES, **SEPARATE}[name]()
    record = Record("r", (WIDE,), EARLIER, "Yes, it is red.", "No.", (TALL,))
    read, scored = tokens(family, record)
    end = END.get(name, family.processor.tokenizer.eos_token)
    assert [text.strip() for text in scored] == [
        f"Yes, it is red.{end}", f"No.{end}", f"Yes, it is red.{end}",
    ]  # fmt: skip
    for turn in EARLIER:
        assert turn["content"] in read
    bos = family.processor.tokenizer.bos_token
    if bos:  # at the beginning of each of the two rows, once
        assert read.count(bos) == 2
    # two answers to the image, one to the retrieved one
    assert read.count("Yes, it is red.") == 2
    assert read.count("No.") == 1


@pytest.mark.parametrize("name", [*FAMILIES, *SEPARATE])
def test_every_image_has_its_placeholder_tokens(name: str) -> None:
    family = {**FAMILIES, **SEPARATE}[name]()
    turn = {"role": "user", "content": "Describe."}
    record = Record("r", (WIDE, SQUARE), (turn,), "A.", "B.", (TALL,))
    batch = PreferenceCollator(family.processor, 3)([record])
    token = image_token_id(family.processor)
    found = (batch["input_ids"] == token).sum(1).tolist()
    assert found == [batch["images"].tokens[index] for index in batch["images"].rows]
    assert batch["images"].counts == (2, 1)


def test_llava_onevision_prompts_are_equal_in_generation_and_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = FAMILIES["llava-onevision"]()
    turn = {"role": "user", "content": "Describe."}
    record = Record("r", (WIDE,), (turn,), "A boat.", "A tree.", (TALL,))
    read, _ = tokens(family, record)
    assert "<|im_start|>assistant\nA boat.<|im_end|>" in read
    assert "assistant \n" not in read
    # only white space may differ
    changed = family.processor.chat_template.replace("assistant\n", "model\n")
    monkeypatch.setattr(family.processor, "chat_template", changed)
    with pytest.raises(RefusedError, match="must keep the prompt and the answer as they are"):
        tokens(family, record)
