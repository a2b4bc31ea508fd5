"""TRL's DPOTrainer with a collator that makes rDPO of two DPO pairs, as its users would.

A pair is two of TRL's pairs: ``(v, y_w)`` over ``(v, y_l)`` and over ``(v_l, y_w)``. TRL's mean
over both is half the loss of the paper, so the loss weight is 2.

Without Triton, TRL 1.16 scores every position of every sequence, with PyTorch operators that
imitate its kernel. ``plain_head`` scores only the answers, as TRL does on GPUs, with a plain
log-softmax, as a TRL that is optimised for CPUs might.
"""

from __future__ import annotations

import copy
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from benchmarks.step.setup import Job, lora_config, training_options
from realign.data.records import Record
from realign.modeling.adapters import quiet_peft


class RdpoCollator(DataCollatorForVisionPreference):
    """Collator of ``[v y_w, v y_w | v y_l, v_l y_w]``, for images of one size."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Let TRL collate the pairs with the original images, then put in the retrieved ones."""
        retrieved = [example["rejected_images"] for example in examples]
        text_pairs = [dict(example) for example in examples]
        image_pairs = [{**example, "rejected": example["chosen"]} for example in examples]
        batch = super().torch_call([*text_pairs, *image_pairs])
        pixels = self.processor.image_processor(
            [image for images in retrieved for image in images], return_tensors="pt"
        )["pixel_values"]
        batch["pixel_values"][-len(pixels) :] = pixels  # of the last rows
        return batch


class PlainHead:
    """Stands in for ``ChunkedLogProbFunction``: the same arguments and results."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        """Return log-probabilities, entropy, nothing, mean logits and whether targets are best."""
        logits = functional.linear(hidden, weight, bias)
        logps = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
            mean, is_top1 = logits.mean(-1), logits.argmax(-1) == targets
        return logps.gather(-1, targets[:, None]).squeeze(-1), entropy, None, mean, is_top1


def use_plain_head() -> None:
    """Let TRL's trainers of this process score answers alone, with :class:`PlainHead`."""
    utils._use_triton = lambda device: True  # decides which positions are scored
    utils._ChunkedLogProbFunction = PlainHead


def make_trainer(
    job: Job, model: Any, processor: Any, records: list[Record]
) -> tuple[DPOTrainer, dict[str, float]]:
    """Return the trainer of a job, and no facts about it."""
    is_lora = job.mode == "lora"
    if job.plain_head:
        use_plain_head()
    arguments = DPOConfig(
        **training_options(job), max_length=None, loss_weights=[2.0], beta=0.1, max_grad_norm=1.0
    )
    with quiet_peft():
        trainer = DPOTrainer(
            model=model,
            ref_model=None if is_lora else copy.deepcopy(model).eval().requires_grad_(False),
            args=arguments,
            data_collator=RdpoCollator(processor, max_length=None),
            train_dataset=_dataset(records),
            processing_class=processor,
            peft_config=lora_config(job, model) if is_lora else None,
        )
    return trainer, {}


def _dataset(records: list[Record]) -> datasets.Dataset:
    images = datasets.List(datasets.Image())
    messages = datasets.List(
        {"role": datasets.Value("string"), "content": datasets.Value("string")}
    )
    features = datasets.Features(
        images=images,
        rejected_images=images,
        prompt=messages,
        chosen=messages,
        rejected=messages,
    )
    return datasets.Dataset.from_list(
        [
            {
                "images": [{"bytes": raw, "path": None} for raw in record.images],
                "rejected_images": [{"bytes": raw, "path": None} for raw in record.rejected_images],
                "prompt": list(record.prompt),
                "chosen": [{"role": "assistant", "content": record.chosen}],
                "rejected": [{"role": "assistant", "content": record.rejected}],
            }
            for record in records
        ],
        features=features,
    )
