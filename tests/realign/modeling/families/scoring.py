"""Log-probabilities of answers in two ways: realign's layouts, and one stock call a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PaliGemmaProcessor, PreTrainedModel

from realign.data.records import Record
from realign.modeling.collate import CELLS, PreferenceCollator
from realign.modeling.logit_transform import find_logit_transform
from realign.modeling.preference_forward import body_states
from realign_kernels import linear_logprob
from tests.realign.modeling.families.family import Family

LAYOUT = ("answer_labels", "answer_index", "sequence_ids", "num_tokens", "ids", "ref_logps")


def collate(family: Family, records: list[Record], cells: int, *, shared: bool) -> dict[str, Any]:
    """A batch in the model's precision."""
    batch = PreferenceCollator(family.processor, cells, shared_prefix=shared)(records)
    return {name: _as_model(family.model, value) for name, value in batch.items()}


def _as_model(model: PreTrainedModel, value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(model.dtype) if is_real else value


def token_logps(family: Family, batch: dict[str, Any]) -> dict[int, Tensor]:
    """Return the log-probabilities of every answer that is present, by cell * P + pair."""
    model: Any = family.model
    inputs = {name: value for name, value in batch.items() if name not in LAYOUT}
    packing, images = inputs.pop("packing"), inputs.pop("images")
    states = body_states(model, inputs, packing=packing, images=images)
    transform = find_logit_transform(model)
    logps = linear_logprob(
        states.flatten(0, 1)[batch["answer_index"]],
        model.get_output_embeddings().weight,
        batch["answer_labels"],
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
    )
    ids = batch["sequence_ids"]
    return {index: logps[ids == index] for index in sorted(set(ids.tolist()))}


def stock_token_logps(family: Family, records: list[Record], cells: int) -> dict[int, Tensor]:
    """The same, each from a call of transformers' own processor and model on that sequence alone,
    and a log-softmax in float64.
    """
    logps = {}
    for cell in range(cells):
        for index, record in enumerate(records):
            if CELLS[cell][1] and not record.rejected_images:
                continue
            inputs, start = stock_inputs(family, record, cell)
            inputs = {name: _as_model(family.model, value) for name, value in inputs.items()}
            with torch.no_grad():
                logits = family.model(**inputs).logits[0].double()
            labels = inputs["input_ids"][0, start:]
            steps = logits[start - 1 : -1].log_softmax(-1)
            logps[cell * len(records) + index] = steps.gather(1, labels[:, None])[:, 0]
    return logps


def stock_inputs(family: Family, record: Record, cell: int) -> tuple[dict[str, Tensor], int]:
    """Return the inputs of one cell up to its end of turn, and where its answer begins.

    They are made by transformers' own processor.
    """
    which, retrieved = CELLS[cell]
    answer = getattr(record, which)
    images = record.open_images(rejected=retrieved)
    processor: Any = family.processor
    tokenizer = processor.tokenizer
    question = record.prompt[0]["content"]
    if isinstance(processor, PaliGemmaProcessor):
        if images:
            inputs = processor(
                text="<image>" * len(images) + question, images=[images], suffix=answer
            )  # asked for tensors, it warns of its own labels
            inputs.pop("labels")
            inputs = {name: torch.tensor(np.array(value)) for name, value in inputs.items()}
        else:  # the processor wants images
            inputs = tokenizer(
                f"{tokenizer.bos_token}{question}\n", f"{answer}{tokenizer.eos_token}",
                return_token_type_ids=True, add_special_tokens=False, return_tensors="pt",
            )  # fmt: skip
        return dict(inputs), int((inputs["token_type_ids"] == 0).sum())
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    end = END_OF_TURN.get(type(processor).__name__, tokenizer.eos_token)
    lead = " " if prompt.endswith((":", "[/INST]")) else ""
    options = {
        "images": [images] if images else None,
        "add_special_tokens": not prompt.startswith(tokenizer.bos_token or "none"),
        "return_tensors": "pt",
    }
    start = processor(text=[prompt], **options)["input_ids"].shape[1]
    return dict(processor(text=[f"{prompt}{lead}{answer}{end}"], **options)), start


END_OF_TURN = {"Gemma3Processor": "<end_of_turn>"}
