"""The batch that the loss reads, by hand and against the model's own tokenisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AddedToken

from realign.errors import RefusedError
from realign.modeling.chat_template import Renderer, user_turns
from realign.modeling.collate import PreferenceCollator
from realign.modeling.processors import load_processor
from realign.modeling.row_checks import check_rows

IMAGE_TOKENS = 9


@pytest.fixture(scope="module")
def processor(model_dir):
    return load_processor(model_dir)


def scored(batch) -> dict[int, list[int]]:
    """Labels of every sequence."""
    labels: dict[int, list[int]] = {}
    for sequence, label in zip(batch["sequence_ids"], batch["answer_labels"], strict=True):
        labels.setdefault(int(sequence), []).append(int(label))
    return labels


def scored_texts(processor, batch) -> list[str]:
    return [processor.tokenizer.decode(ids) for _, ids in sorted(scored(batch).items())]


def test_rows_are_cell_major_and_score_answer_and_end_of_turn(processor, records) -> None:
    rows = records(2)
    batch = PreferenceCollator(processor, cells=4)(rows)
    expected = [row.chosen for row in rows] + [row.rejected for row in rows]
    answers = [f" {answer}</s>" for answer in expected + expected]
    assert scored_texts(processor, batch) == answers
    assert batch["ids"] == ["r0", "r1"]
    lengths = [len(ids) for _, ids in sorted(scored(batch).items())]
    assert [n for cell in batch["num_tokens"] for n in cell] == lengths
    shared = PreferenceCollator(processor, cells=4, shared_prefix=True)(rows)
    assert scored_texts(processor, shared) == answers
    assert shared["num_tokens"] == batch["num_tokens"]


def test_each_distinct_image_is_processed_once(processor, records) -> None:
    rows = records(2)
    originals, retrieved = (
        [image for row in rows for image in row.open_images(rejected=rejected)]
        for rejected in (False, True)
    )
    batch = PreferenceCollator(processor, cells=4)(rows)
    expected = processor.image_processor([*originals, *retrieved], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["images"].rows == (0, 1, 0, 1, 2, 3, 2, 3)
    shared = PreferenceCollator(processor, cells=4, shared_prefix=True)(rows)
    assert shared["images"].rows == (0, 1, 2, 3)  # as they come, so nothing is copied
    assert shared["images"].tokens == (IMAGE_TOKENS,) * 4
    assert torch.equal(shared["pixel_values"], expected["pixel_values"][[0, 2, 1, 3]])


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_labels_are_predicted_by_the_token_before_them(
    processor, records, shared_prefix: bool
) -> None:
    batch = PreferenceCollator(processor, cells=3, shared_prefix=shared_prefix)(records(3))
    ids = batch["input_ids"].flatten().tolist()
    answers = scored(batch)
    places = {sequence: [] for sequence in answers}
    for sequence, place in zip(batch["sequence_ids"], batch["answer_index"], strict=True):
        places[int(sequence)].append(int(place))
    for sequence, labels in answers.items():
        first, *later = places[sequence]
        assert processor.tokenizer.decode(ids[first]).endswith(":")  # the prompt's last token
        assert [ids[place] for place in later] == labels[:-1]
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image_token) == IMAGE_TOKENS * (6 if shared_prefix else 9)


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_pair_without_retrieved_image_has_no_image_cell(
    processor, records, shared_prefix: bool
) -> None:
    with_image, without = records(2)
    without = dataclasses.replace(without, rejected_images=())
    collator = PreferenceCollator(processor, cells=3, shared_prefix=shared_prefix)
    batch = collator([with_image, without])
    assert sorted(scored(batch)) == [0, 1, 2, 3, 4]
    assert batch["num_tokens"][2][0] > 0
    assert batch["num_tokens"][2][1] == 0


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_pairs_without_images_have_no_pixels(processor, records, shared_prefix: bool) -> None:
    rows = [dataclasses.replace(row, images=(), rejected_images=()) for row in records(2)]
    batch = PreferenceCollator(processor, cells=3, shared_prefix=shared_prefix)(rows)
    assert "pixel_values" not in batch
    assert batch["images"] is None
    assert batch["num_tokens"][2] == [0, 0]


def test_references_are_found_by_content(processor, records) -> None:
    rows = records(3)
    reference = {row.key: torch.arange(3.0).double() - i for i, row in enumerate(rows)}
    batch = PreferenceCollator(processor, 2, reference)([rows[2], rows[0]])
    assert batch["ref_logps"].tolist() == [[-2.0, 0.0], [-1.0, 1.0]]
    assert batch["ref_logps"].dtype == torch.float32


def test_too_long_rows_are_refused_and_not_truncated(processor, records) -> None:
    with pytest.raises(RefusedError, match=r"row r0: must have at most max_length = 30 tokens"):
        PreferenceCollator(processor, 2, max_length=30)(records(1))


def test_multi_turn_prompts_put_images_in_the_first_user_turn() -> None:
    prompt = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    turns = user_turns(prompt, num_images=2)
    assert turns[0]["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "One?"},
    ]
    assert turns[2]["content"] == [{"type": "text", "text": "Two?"}]


class Templated:
    """The embedded processor with another chat template."""

    def __init__(self, processor, template: str) -> None:
        self._processor, self._template = processor, template
        self.tokenizer = processor.tokenizer

    def apply_chat_template(self, turns, **options):
        return self._processor.apply_chat_template(turns, chat_template=self._template, **options)


TURNS = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content if p.type == 'text' %}"
    "{{ p.text }}{% endfor %}END{% endfor %}"
)


@pytest.mark.parametrize(
    ("end", "scored"),
    [
        ("</s>\n", " Fine.</s>"),  # what follows the end-of-turn token is not scored
        ("", " Fine.</s>"),  # a template that never ends the turn gets the end-of-sequence token
        (" ", " Fine.</s>"),  # LLaVA-1.5's published template
    ],
)
def test_the_end_of_a_turn_is_scored(processor, end: str, scored: str) -> None:
    template = TURNS.replace("END", end) + "{% if add_generation_prompt %}assistant:{% endif %}"
    renderer = Renderer(Templated(processor, template))
    row = renderer.render([{"role": "user", "content": "How?"}], "Fine.", 0, "row 0")
    assert processor.tokenizer.decode(row.answer_ids[: row.num_scored]) == scored


# google/gemma-3: content trimmed, the assistant called model, BOS written by the template
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def test_the_template_of_gemma_is_rendered_as_its_model_expects(model_dir, records) -> None:
    processor = load_processor(model_dir)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    turn_tokens = [AddedToken(f"<{name}_of_turn>", special=True) for name in ("start", "end")]
    tokenizer.add_tokens(turn_tokens, special_tokens=True)
    processor.chat_template = GEMMA_TEMPLATE
    prompt = (
        {"role": "user", "content": " How? "},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    )
    rows = [dataclasses.replace(row, prompt=prompt) for row in records(2)]
    check_rows(rows, processor, cells=3, max_length=None)
    batch = PreferenceCollator(processor, cells=3)(rows)
    bos, end = tokenizer.convert_tokens_to_ids(["<bos>", "<end_of_turn>"])
    assert (batch["input_ids"] == bos).sum(1).tolist() == [1] * 6
    answers = [row.chosen for row in rows] + [row.rejected for row in rows]
    labels = [ids for _, ids in sorted(scored(batch).items())]
    assert [ids.count(end) for ids in labels] == [1] * 6  # earlier turns are prompt
    for ids, answer in zip(labels, [*answers, *answers[:2]], strict=True):
        assert ids[-1] == end  # and not the line break after it
        assert tokenizer.decode(ids[:-1]).strip() == answer


def test_an_end_of_turn_in_ordinary_tokens_is_refused(processor) -> None:
    template = TURNS.replace("END", "<end>") + "{% if add_generation_prompt %}assistant:{% endif %}"
    renderer = Renderer(Templated(processor, template))
    with pytest.raises(
        RefusedError,
        match=r"row 0: the chat template of Templated .* or leave it open, got '<end>'",
    ):
        renderer.render([{"role": "user", "content": "How?"}], "Fine.", 0, "row 0")


def test_a_processor_that_alters_texts_is_refused(processor, records) -> None:
    class Lowering(Templated):
        image_token = processor.image_token

        def __call__(self, text, **options):
            return self._processor(text=[line.lower() for line in text], **options)

    lowering = Lowering(processor, processor.chat_template)
    for max_length in (None, 1000):
        with pytest.raises(
            RefusedError, match=r"row r0: Lowering must leave the prompt as .* instead of 'Describe"
        ):
            check_rows(records(2), lowering, cells=3, max_length=max_length)


def test_a_template_that_changes_the_prompt_is_refused(processor) -> None:
    template = "{% if add_generation_prompt %}new{% else %}old{% endif %}" + TURNS
    renderer = Renderer(Templated(processor, template))
    with pytest.raises(RefusedError, match="row 0: the chat template must keep the prompt"):
        renderer.render([{"role": "user", "content": "How?"}], "Fine.", 0, "row 0")
