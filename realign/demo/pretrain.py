"""Trains the embedded model: ``python -m realign.demo.pretrain --out FOLDER``, seeded, under an
hour on two cores.

The model sees only habitual scenes (partners together 85 % of the time), and only as long as it
takes to see at all, so that it looks at the image and still lets the habit talk: the case that
Re-Align is for.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from realign.build.masking import Lexicon
from realign.demo.drawing import draw
from realign.demo.tasks import LEXICON_PATH, Example, pretraining_example
from realign.demo.world import habitual_scene

IMAGE_SIZE = 48
PATCH_SIZE = 8
WIDTH = 128
LAYERS = 4
VOCABULARY = 512
BATCH_SIZE = 32
LOG_STEPS = 50

# Vicuna-like turns, as LLaVA-1.5; the answer ends with the end-of-sequence token.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}USER: {% else -%}ASSISTANT: {% endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}{{ ' ' }}{%- else -%}{{ '</s>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""


def build_processor() -> LlavaProcessor:
    """A LlavaProcessor: CLIP preprocessing on Pillow, and byte-level BPE trained on sentences of
    the world.
    """
    rng = Random(0)
    lexicon = Lexicon.load(LEXICON_PATH)
    examples = [pretraining_example(habitual_scene(rng), lexicon, rng) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (f"USER: {example.prompt} ASSISTANT: {example.answer}" for example in examples),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "</s>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """An untrained LLaVA of 1.6 million parameters: CLIP tower, two-layer projector, Llama."""
    tokenizer = processor.tokenizer
    heads = 4
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=heads,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=512,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                tie_word_embeddings=True,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )


def collate(examples: list[Example], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Padded inputs whose labels are the answers' tokens."""
    prompts, texts = [], []
    for example in examples:
        turn = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": example.prompt}],
        }
        reply = {"role": "assistant", "content": example.answer}
        prompts.append(processor.apply_chat_template([turn], add_generation_prompt=True))
        texts.append(processor.apply_chat_template([turn, reply]))
    images = [draw(example.scene) for example in examples]
    batch = processor(
        images=images, text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    image_tokens = (IMAGE_SIZE // PATCH_SIZE) ** 2
    for row, prompt in enumerate(prompts):
        labels[row, : len(processor.tokenizer(prompt).input_ids) - 1 + image_tokens] = -100
    return {**batch, "labels": labels}


class Phase(NamedTuple):
    """One cycle of the learning rate over one mixture of instructions."""

    steps: int
    learning_rate: float
    question_share: float
    location_share: float


# Describing teaches the model to see; locations are meant to teach it to look for what a question
# names, which one bit an answer does not (docs/decisions/002-location-questions.md).
PHASES = (Phase(4500, 1.5e-3, 1 / 3, 0.0), Phase(2500, 1.5e-3, 0.35, 0.35))


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, phase: Phase, rng: Random
) -> None:
    """Train in place on fresh habitual scenes."""
    lexicon = Lexicon.load(LEXICON_PATH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.steps, pct_start=0.1
    )
    started, mean_loss = time.monotonic(), 0.0
    model.train()
    for step in range(1, phase.steps + 1):
        examples = [
            pretraining_example(
                habitual_scene(rng), lexicon, rng, phase.question_share, phase.location_share
            )
            for _ in range(BATCH_SIZE)
        ]
        loss = model(**collate(examples, processor)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss += loss.item() / LOG_STEPS
        if step % LOG_STEPS == 0:
            pace = (time.monotonic() - started) / step
            print(f"step {step}/{phase.steps} loss {mean_loss:.4f} {pace:.2f} s/step", flush=True)
            mean_loss = 0.0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(processor)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    for number, phase in enumerate(PHASES):
        train(model, processor, phase, Random(args.seed + number))
    model.eval().save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
