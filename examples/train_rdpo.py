"""Train rDPO with LoRA, using only the public functions of the library.

python examples/train_rdpo.py --model llava-hf/llava-1.5-7b-hf --data DATASET --out runs/llava

`realign train` does the same, with more checks, safe checkpoints and all options. Start from this
file if your training has to do something else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import realign

CELLS = 3  # chosen, text_rejected, image_rejected


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="parquet, or JSON")
    parser.add_argument("--images", type=Path, help="folder of the images that JSON names")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if has_gpu else torch.float32

    folder = realign.resolve_model(options.model)
    records = realign.read_records(options.data, options.images)
    processor = realign.load_processor(folder)
    realign.check_rows(records, processor, cells=CELLS, max_length=None)

    # the reference never runs again: another run, with another rate or beta, reads this cache
    cache = options.out / "cache"
    scoring = realign.Scoring(folder, CELLS, "label", realign.Numerics(dtype), batch_size=4)
    realign.build_cache(records, scoring, cache)
    reference = realign.read_cache(cache, records, scoring.identity())

    model = realign.load_model(folder, dtype, name=options.model)
    rank, alpha = options.rank, 2 * options.rank
    model = realign.add_adapter(
        model, rank=rank, alpha=alpha, targets="all-linear", freeze_vision=True
    )
    args = realign.RDPOConfig(
        output_dir=str(options.out / "steps"),
        beta=0.1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a value below 1 is a share of all steps
        num_train_epochs=options.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        logging_steps=1,
        report_to="none",
        use_cpu=not has_gpu,
    )
    trainer = realign.RDPOTrainer(model, args, records, processor, reference)
    trainer.train()
    checkpoint = options.out / "checkpoint"
    trainer.save_model(str(checkpoint))
    return checkpoint


if __name__ == "__main__":
    main()
