"""TRL's own DPOTrainer with exact log-probabilities, on the embedded model and drawn images.

python examples/trl_patched_dpo.py

Two lines are ours: the import of `patch_trl` and its call, which needs no `with` where it is to
hold until the program ends. The rest is TRL as its users write it.
"""

from __future__ import annotations

import tempfile
from random import Random

import datasets
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from realign.demo.drawing import draw
from realign.demo.run import MODEL
from realign.demo.world import DESCRIBE, free_scene
from realign.integrations.trl import patch_trl


def drawn_pairs(count: int) -> datasets.Dataset:
    """Return images with a description that is true and one of another scene."""
    rng, rows = Random(0), []
    for _ in range(count):
        scene, other = free_scene(rng), free_scene(rng)
        rows.append(
            {
                "images": [draw(scene)],
                "prompt": [{"role": "user", "content": DESCRIBE}],
                "chosen": [{"role": "assistant", "content": scene.caption()}],
                "rejected": [{"role": "assistant", "content": other.caption()}],
            }
        )
    return datasets.Dataset.from_list(rows)


def main(steps: int = 20) -> tuple[list[float], int]:
    """Train, and return the loss of every step and the number of calls of the exact head."""
    with tempfile.TemporaryDirectory() as folder, patch_trl() as patch:
        args = DPOConfig(
            folder,
            beta=0.1,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        )
        trainer = DPOTrainer(
            AutoModelForImageTextToText.from_pretrained(MODEL),
            ref_model=AutoModelForImageTextToText.from_pretrained(MODEL),
            args=args,
            train_dataset=drawn_pairs(32),
            processing_class=AutoProcessor.from_pretrained(MODEL),
        )
        trainer.train()
    assert not patch.passed_on  # nothing went to TRL's own function
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], patch.calls


if __name__ == "__main__":
    losses, calls = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"{calls} calls of the exact head in {len(losses)} steps: policy and reference")
