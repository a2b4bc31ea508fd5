"""Train rDPO in TRL: LoRA on the embedded model, with reference log-probabilities computed once.

python examples/trl_rdpo.py

It needs no network and no GPU, and takes less than a minute. For your own model, replace MODEL by
its name and the drawn pairs by your rows; docs/guides/trainers/trl.md explains the options.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from trl import DPOConfig

import realign
from realign.demo.drawing import draw
from realign.demo.run import MODEL
from realign.demo.world import DESCRIBE, free_scene
from realign.integrations.trl import RdpoTrainer

IMAGES = datasets.List(datasets.Image())
TURNS = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
COLUMNS = {"images": IMAGES, "rejected_images": IMAGES} | dict.fromkeys(
    ("prompt", "chosen", "rejected"), TURNS
)


def drawn_pairs(count: int) -> datasets.Dataset:
    """Return rows in TRL's columns, with the retrieved image of each in rejected_images."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        scene, other = free_scene(rng), free_scene(rng)
        rows.append(
            {
                "images": [draw(scene)],
                "rejected_images": [draw(other)],
                "prompt": [{"role": "user", "content": DESCRIBE}],
                "chosen": [{"role": "assistant", "content": scene.caption()}],
                "rejected": [{"role": "assistant", "content": other.caption()}],
            }
        )
    return datasets.Dataset.from_list(rows, features=datasets.Features(COLUMNS))


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/trl-rdpo"))
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(arguments)
    pairs = drawn_pairs(14)

    # the reference runs once; `realign cache --data pairs.parquet` does the same
    options.out.mkdir(parents=True, exist_ok=True)
    pairs.to_parquet(options.out / "pairs.parquet")
    records = realign.read_records(options.out / "pairs.parquet", None)
    scoring = realign.Scoring(MODEL, 3, "label", realign.Numerics(torch.float32))
    realign.build_cache(records, scoring, options.out / "cache")
    reference = realign.read_cache(options.out / "cache", records, scoring.identity())

    trainer = RdpoTrainer(
        model=str(MODEL),
        args=DPOConfig(
            output_dir=str(options.out / "steps"),
            beta=0.1,
            learning_rate=1e-3,
            max_steps=options.steps,
            per_device_train_batch_size=2,
            logging_steps=2,
            bf16=False,  # as in the cache
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=pairs.select(range(12)),
        eval_dataset=pairs.select(range(12, 14)),
        processing_class=realign.load_processor(MODEL),
        peft_config=LoraConfig(r=8, target_modules=r".*language_model.*\.(q|k|v|o)_proj"),
        reference=reference,
    )
    trainer.train()
    print(trainer.evaluate())
    adapter = options.out / "adapter"
    trainer.save_model(str(adapter))
    return adapter


if __name__ == "__main__":
    main()
