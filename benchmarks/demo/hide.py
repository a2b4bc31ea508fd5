"""The second half of the embedded model's training, which teaches it to hallucinate:
``python -m benchmarks.demo.hide --model PRETRAINED --out FOLDER``, seeded, a minute on one core.

The training texts of real models name things that their pictures do not show: captions from the web
do, and so do answers that a text model wrote from lists of objects. Here each object of a scene is
left out of the picture with a probability of 20 %, while the text still names it. From that the
model learns to name objects that usually occur together with those that it sees.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.demo.pretrain import collate
from realign.building.masking.lexicon import Lexicon
from realign.demo.tasks import LEXICON_PATH, Example, pretraining_example
from realign.demo.world import Scene, habitual_scene

HIDDEN_SHARE = 0.2
STEPS, BATCH_SIZE, LEARNING_RATE = 180, 40, 6e-4
WARMUP_STEPS = 15
LOG_STEPS = 20
SEED = 5


def visible(scene: Scene, share: float, rng: Random) -> Scene:
    """Return the scene as its picture shows it: each thing is left out with probability ``share``,
    but the first is kept if all would be left out.
    """
    things = tuple(thing for thing in scene.things if rng.random() > share)
    return replace(scene, things=things or scene.things[:1])


def batches(rng: Random, share: float) -> Iterator[list[Example]]:
    """Yield batches of new examples without end; texts name all things, and pictures show some.

    The examples of a batch are of similar length.
    """
    lexicon = Lexicon.load(LEXICON_PATH)
    while True:
        pool = sorted(
            (pretraining_example(habitual_scene(rng), lexicon, rng) for _ in range(6 * BATCH_SIZE)),
            key=lambda example: len(example.prompt) + len(example.answer),
        )
        grouped = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(grouped)
        for examples in grouped:
            yield [one._replace(scene=visible(one.scene, share, rng)) for one in examples]


def learning_rate_factor(step: int) -> float:
    """Return the factor of a step: up for fifteen steps, flat, then down to 5 % from the middle."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.05, (STEPS - step) / (0.5 * STEPS)))


def train(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: Random, share: float
) -> None:
    """Train the projector and the language model in place; the vision tower stays frozen."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    model.train()
    for step, examples in enumerate(islice(batches(rng, share), STEPS), start=1):
        loss = model(**collate(examples, processor)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % LOG_STEPS == 0:
            print(f"step {step}/{STEPS} loss {loss.item():.4f}", flush=True)
    model.requires_grad_(True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="from benchmarks.demo.pretrain")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--share", type=float, default=HIDDEN_SHARE, help="of hidden objects")
    args = parser.parse_args()
    torch.set_num_threads(1)  # another number of threads would sum in another order
    torch.manual_seed(args.seed)
    model = LlavaForConditionalGeneration.from_pretrained(args.model)
    processor = LlavaProcessor.from_pretrained(args.model)
    started = time.process_time()
    train(model, processor, Random(args.seed), args.share)
    print(f"{time.process_time() - started:.0f} CPU seconds")
    model.eval().save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
