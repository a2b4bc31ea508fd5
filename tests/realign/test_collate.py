"""The batch that the loss reads, by hand and against the model's own tokenisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AddedToken

from realign.check.rows import check_rows
from realign.collate import PreferenceCollator, Renderer, user_turns
from realign.errors import RefusedError
from realign.modeling import load_processor

IMAGE_TOKENS = 9


@pytest.fixture(scope="module")
def processor(model_dir):
    return load_processor(model_dir)


def scored_text(processor, labels: torch.Tensor) -> str:
    return processor.tokenizer.decode(labels[labels != -100])


def test_rows_are_cell_major_and_score_answer_and_end_of_turn(processor, records) -> None:
    rows = records(2)
    batch = PreferenceCollator(processor, cells=4)(rows)
    labels = batch["preference_labels"]
    expected = [row.chosen for row in rows] + [row.rejected for row in rows]
    assert [scored_text(processor, line) for line in labels] == [
        f" {answer}</s>" for answer in expected + expected
    ]
    assert batch["ids"] == ["r0", "r1"]
    assert batch["pixel_values"].shape[0] == 8
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])  # chosen, text_rejected
    assert torch.equal(batch["pixel_values"][4], batch["pixel_values"][6])  # both on v_l
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][4])


def test_labels_are_shifted_and_every_image_token_is_there(processor, records) -> None:
    batch = PreferenceCollator(processor, cells=3)(records(3))
    labels, ids = batch["preference_labels"], batch["input_ids"]
    scored = labels[:, :-1] != -100
    assert torch.equal(labels[:, :-1][scored], ids[:, 1:][scored])
    assert (labels[:, -1] == -100).all()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (ids == image_token).sum(1).tolist() == [IMAGE_TOKENS] * 9


def test_a_pair_without_retrieved_image_scores_no_image_cell(processor, records) -> None:
    with_image, without = records(2)
    without = dataclasses.replace(without, rejected_images=())
    labels = PreferenceCollator(processor, cells=3)([with_image, without])["preference_labels"]
    assert (labels[4] != -100).any()
    assert (labels[5] == -100).all()


def test_text_only_pairs(processor, records) -> None:
    rows = [dataclasses.replace(row, images=(), rejected_images=()) for row in records(2)]
    batch = PreferenceCollator(processor, cells=3)(rows)
    assert "pixel_values" not in batch
    assert (batch["preference_labels"][4:] == -100).all()


def test_references_are_found_by_content(processor, records) -> None:
    rows = records(3)
    reference = {row.key: torch.arange(3.0).double() - i for i, row in enumerate(rows)}
    batch = PreferenceCollator(processor, 2, reference)([rows[2], rows[0]])
    assert batch["ref_logps"].tolist() == [[-2.0, 0.0], [-1.0, 1.0]]
    assert batch["ref_logps"].dtype == torch.float32


def test_too_long_rows_are_an_error_not_cut(processor, records) -> None:
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
def test_end_of_turn(processor, end: str, scored: str) -> None:
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


def test_gemmas_template(model_dir, records) -> None:
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
    ids, labels = batch["input_ids"], batch["preference_labels"]
    bos, end = tokenizer.convert_tokens_to_ids(["<bos>", "<end_of_turn>"])
    assert (ids == bos).sum(1).tolist() == [1] * 6
    assert (labels == end).sum(1).tolist() == [1] * 6  # earlier turns are prompt
    answers = [row.chosen for row in rows] + [row.rejected for row in rows]
    for line, answer in zip(labels[:4], answers, strict=True):
        scored = line[line != -100]
        assert scored[-1] == end  # and not the line break after it
        assert tokenizer.decode(scored[:-1]).strip() == answer


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
    with pytest.raises(
        RefusedError, match=r"row r0: Lowering must leave the answer as .* got ' there is"
    ):
        PreferenceCollator(lowering, cells=1)(records(1))
    with pytest.raises(RefusedError, match="Lowering must leave the answer"):
        check_rows(records(2), lowering, cells=3, max_length=None)


def test_a_template_that_changes_the_prompt_is_refused(processor) -> None:
    template = "{% if add_generation_prompt %}new{% else %}old{% endif %}" + TURNS
    renderer = Renderer(Templated(processor, template))
    with pytest.raises(RefusedError, match="row 0: the chat template must keep the prompt"):
        renderer.render([{"role": "user", "content": "How?"}], "Fine.", 0, "row 0")
