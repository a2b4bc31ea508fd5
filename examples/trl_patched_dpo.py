"""TRL's own DPOTrainer with exact log-probabilities, on the embedded model and coloured images.

python examples/trl_patched_dpo.py

Only two lines differ from a program for TRL alone: the import of `patch_trl`, and its call. The
call needs no `with` if the patch should last until the program ends.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from itertools import permutations

import datasets
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

from realign.integrations.trl import patch_trl

MODEL = str(files("realign") / "demo" / "model")
COLORS = ("red", "green", "blue", "yellow", "black", "white")


def colour_pairs() -> datasets.Dataset:
    """Return images of one colour, each with an answer that names it and one that does not."""
    return datasets.Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (48, 48), color)],
                "prompt": [{"role": "user", "content": "What colour is the image?"}],
                "chosen": [{"role": "assistant", "content": f"The image is {color}."}],
                "rejected": [{"role": "assistant", "content": f"The image is {other}."}],
            }
            for color, other in permutations(COLORS, 2)
        ]
    )


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
            train_dataset=colour_pairs(),
            processing_class=AutoProcessor.from_pretrained(MODEL),
        )
        trainer.train()
    assert not patch.passed_on  # nothing went to TRL's own function
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], patch.calls


if __name__ == "__main__":
    losses, calls = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"{calls} calls of the exact head in {len(losses)} steps: policy and reference")
