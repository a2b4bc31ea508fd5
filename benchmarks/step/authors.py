"""The training step of the authors' code, on current transformers.

It runs three forwards of the policy and three of the reference, one after another. After each, the
images are encoded a second time, and the log-softmax of the fp32 logits of every position is taken
over the whole vocabulary. Left out, in its favour, are a cross-entropy over all positions that is
thrown away, copies of all logits to the host for metrics, and the search for the most probable
token that is not the label. The labels' own log-probabilities are summed, so its loss is the
paper's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from benchmarks.step.setup import Job, lora_config, training_options
from realign.data.records import Record
from realign.modeling.adapters import quiet_peft
from realign.modeling.chat_template import user_turns

BETA = 0.1
IGNORE_INDEX = -100
BRANCHES = (("chosen", False), ("rejected", False), ("chosen", True))


class BranchCollator:
    """Collates records into the inputs of the three forwards, with labels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return ``branches``: model inputs with ``labels``, one dictionary per forward."""
        return {"branches": [self._branch(records, *branch) for branch in BRANCHES]}

    def _branch(self, records: Sequence[Record], answer: str, retrieved: bool) -> dict[str, Tensor]:
        texts, lengths, images = [], [], []
        for record in records:
            images.append(record.open_images(rejected=retrieved))
            turns = user_turns(record.prompt, len(images[-1]))
            parts = [{"type": "text", "text": getattr(record, answer)}]
            reply = {"role": "assistant", "content": parts}
            prompt = self._template(turns, add_generation_prompt=True)
            texts.append(self._template([*turns, reply]))
            lengths.append(len(self._tokens(texts[-1])) - len(self._tokens(prompt)))
        inputs = dict(
            self.processor(
                text=texts, images=images, padding=True, padding_side="right", return_tensors="pt"
            )
        )
        positions = torch.arange(inputs["input_ids"].shape[1])
        ends = inputs["attention_mask"].sum(1, keepdim=True)
        is_answer = (positions < ends) & (positions >= ends - torch.tensor(lengths)[:, None])
        inputs["labels"] = inputs["input_ids"].masked_fill(~is_answer, IGNORE_INDEX)
        return inputs

    def _template(self, turns: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text).input_ids


class AuthorsTrainer(Trainer):
    """Trains as the authors' code does."""

    def __init__(self, model: Any, reference: Any | None, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.model_accepts_loss_kwargs = False
        self.reference = reference  # None: the policy with its adapter off

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return eq. (1) of the paper."""
        branches = inputs["branches"]
        chosen, text_rejected, image_rejected = (sequence_logps(model, b) for b in branches)
        off = model.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with torch.no_grad(), off:
            reference = model if self.reference is None else self.reference
            references = [sequence_logps(reference, branch) for branch in branches]
        text_margin = (chosen - text_rejected) - (references[0] - references[1])
        image_margin = (chosen - image_rejected) - (references[0] - references[2])
        losses = -functional.logsigmoid(BETA * text_margin)
        return (losses - functional.logsigmoid(BETA * image_margin)).mean()


def sequence_logps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the summed log-probability of each row's answer, (B,), from all logits."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs, use_cache=False).logits.float()
    names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
    model.get_image_features(**{name: inputs[name] for name in names})  # only to expand labels
    is_answer = labels != IGNORE_INDEX
    logps = logits[:, :-1].log_softmax(-1)
    token_logps = logps.gather(-1, labels.where(is_answer, 0)[..., None]).squeeze(-1)
    return (token_logps * is_answer).sum(-1)


def make_trainer(
    job: Job, model: Any, processor: Any, records: list[Record]
) -> tuple[Trainer, dict[str, float]]:
    """Return the trainer of a job, and no facts about it."""
    reference = None
    if job.mode == "lora":
        from peft import get_peft_model

        torch.manual_seed(job.seed)
        with quiet_peft():
            model = get_peft_model(model, lora_config(job, model))
        if job.checkpoints:
            model.enable_input_require_grads()
    else:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
    trainer = AuthorsTrainer(
        model,
        reference,
        args=TrainingArguments(**training_options(job)),
        data_collator=BranchCollator(processor),
        train_dataset=records,
        processing_class=processor,
    )
    return trainer, {}
