"""The first half of the embedded model's training, seeded, under a quarter of an hour on two cores:
``python -m benchmarks.demo.pretrain --out FOLDER``. :mod:`benchmarks.demo.hide` is the second half.

As for larger models, the vision tower is trained first, to recognise the object in each cell. Then
the whole model is trained on instructions about habitual scenes, in which partners occur together
85 % of the time. It stops as soon as the model looks for what a question names: it then uses the
image but still follows the habit, which is the case that Re-Align is for.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from realign.building.masking.lexicon import Lexicon
from realign.demo.drawing import draw
from realign.demo.tasks import LEXICON_PATH, Example, pretraining_example
from realign.demo.world import COLORS, KINDS, PLACES, habitual_scene

IMAGE_SIZE = 48
PATCH_SIZE = 16  # one patch per cell of the scene
WIDTH = 128
LAYERS = 4
VOCABULARY = 512
BATCH_SIZE = 64
LOG_STEPS = 50
VISION_STEPS, VISION_LEARNING_RATE = 150, 1e-3
STEPS, LEARNING_RATE = 1800, 2e-3
# A tower with the language model's learning rate forgets before the language model has learned to
# use its features.
VISION_FACTOR = 0.1
# With the default of 0.02, so narrow a model learns no attention to the image in hundreds of steps.
INITIALIZER_RANGE = 0.08

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
    """Build a LlavaProcessor: CLIP preprocessing on Pillow, and byte-level BPE trained on sentences
    of the world.
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
    """Build an untrained LLaVA of 1.6 M parameters: CLIP tower, two-layer projector, Llama."""
    tokenizer = processor.tokenizer
    heads = 4
    model = LlavaForConditionalGeneration(
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
    for part in (model.model.language_model, model.model.multi_modal_projector):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
    return model


def collate(examples: list[Example], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Return padded inputs whose labels are the answers' tokens."""
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


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of a step: up for fifty steps, flat, then down to 2 % in the last 40 %."""
    return min((step + 1) / 50, 1.0, max(0.02, (steps - step) / (0.4 * steps)))


def train_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Train the vision tower, in place, to tell the kind and the colour in every cell."""
    rng = Random(1)
    tower = model.model.vision_tower
    kinds, colors = len(KINDS) + 1, len(COLORS) + 1  # the first class is an empty cell
    probe = nn.Linear(WIDTH, kinds + colors)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=VISION_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, VISION_STEPS)
    )
    for _ in range(VISION_STEPS):
        scenes = [habitual_scene(rng) for _ in range(BATCH_SIZE)]
        targets = torch.zeros(BATCH_SIZE, len(PLACES), 2, dtype=torch.int64)
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                targets[row, thing.cell, 0] = KINDS.index(thing.kind) + 1
                targets[row, thing.cell, 1] = COLORS.index(thing.color) + 1
        pixels = processor.image_processor([draw(s) for s in scenes], return_tensors="pt")
        patches = tower(**pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = probe(functional.rms_norm(patches, (WIDTH,)))
        loss = functional.cross_entropy(
            logits[..., :kinds].flatten(0, 1), targets[..., 0].flatten()
        ) + functional.cross_entropy(logits[..., kinds:].flatten(0, 1), targets[..., 1].flatten())
        _update(loss, optimizer, schedule, parameters)
    print(f"vision: last loss {loss.item():.4f}", flush=True)


def _update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: list[nn.Parameter],
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def batches(rng: Random) -> Iterator[list[Example]]:
    """Yield batches of new examples without end; those of a batch are of similar length."""
    lexicon = Lexicon.load(LEXICON_PATH)
    while True:
        pool = sorted(
            (pretraining_example(habitual_scene(rng), lexicon, rng) for _ in range(8 * BATCH_SIZE)),
            key=lambda example: len(example.prompt) + len(example.answer),
        )
        grouped = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(grouped)
        yield from grouped


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: Random) -> None:
    """Train the whole model in place on instructions about habitual scenes."""
    of_tower = list(model.model.vision_tower.parameters())
    others = [weight for name, weight in model.named_parameters() if "vision_tower" not in name]
    groups: list[dict[str, Any]] = [
        {"params": of_tower, "lr": VISION_FACTOR * LEARNING_RATE},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=LEARNING_RATE,
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, STEPS)
    )
    started, mean_loss = time.monotonic(), 0.0
    model.train()
    for step, examples in enumerate(itertools.islice(batches(rng), STEPS), start=1):
        loss = model(**collate(examples, processor)).loss
        _update(loss, optimizer, schedule, [*of_tower, *others])
        mean_loss += loss.item() / LOG_STEPS
        if step % LOG_STEPS == 0:
            pace = (time.monotonic() - started) / step
            print(f"step {step}/{STEPS} loss {mean_loss:.4f} {pace:.2f} s/step", flush=True)
            mean_loss = 0.0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(processor)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")
    train_vision(model, processor)
    train(model, processor, Random(args.seed))
    model.eval().save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
