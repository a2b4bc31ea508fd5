"""Greedy generation with a transformers VLM in this process, in left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from realign.data.images import decode_image
from realign.generation.generator import Answer, Request
from realign.modeling.chat_template import Renderer, user_turns
from realign.modeling.families import process
from realign.modeling.loading import every_rank_loads, load_model
from realign.modeling.processors import load_processor
from realign.runtime.ranks import local_device


class TransformersGenerator:
    """Generator that answers prompts about images. The same batch gives the same answers.

    Args:
        model: A VLM, in evaluation mode on its device.
        processor: Its processor.
        max_new_tokens: Longest answer.
        batch_size: Requests per call of the model.
    """

    def __init__(
        self, model: nn.Module, processor: Any, max_new_tokens: int, batch_size: int = 32
    ) -> None:
        self.model: Any = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._renderer = Renderer(processor)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, max_new_tokens: int, batch_size: int = 32
    ) -> TransformersGenerator:
        """Load a model folder onto this process's GPU, or onto the CPU without one."""
        with every_rank_loads():
            model: Any = load_model(folder, dtype, scoring=False)
        model.to(local_device()).eval()
        return cls(model, load_processor(folder), max_new_tokens, batch_size)

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer each request greedily; whitespace around an answer is removed.

        Raises:
            RefusedError: An image cannot be read.
        """
        return [
            Answer(answer.text.strip(), answer.is_cut)
            for start in range(0, len(requests), self.batch_size)
            for answer in self.generate(requests[start : start + self.batch_size])
        ]

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """Answer requests greedily in one call of the model.

        Args:
            requests: Requests, either all with an image or all without.
            max_new_tokens: Longest answer of this call in tokens; by default the generator's.
        Returns:
            answers: Answers in the order of the requests, with whitespace around them and with
                their numbers of tokens.
        Raises:
            RefusedError: An image cannot be read.
        """
        batch = self.inputs(requests)
        ends = self._end_tokens()
        tokens = self.model.generate(
            **batch,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            pad_token_id=ends[0] if ends else None,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        answers = tokens[:, batch["input_ids"].shape[1] :]
        is_end = torch.isin(answers, torch.tensor(ends, device=answers.device))
        num_tokens = (is_end.cumsum(dim=1) == 0).sum(dim=1)
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        found = zip(texts, is_end.any(dim=1).tolist(), num_tokens.tolist(), strict=True)
        return [Answer(text, not ended, num_tokens=count) for text, ended, count in found]

    def inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for requests, on its device, padded on the left.

        Args:
            requests: Requests, either all with an image or all without.
        Raises:
            RefusedError: An image cannot be read.
        """
        images = [
            [decode_image(request.image.read_bytes(), request.image.name)]
            for request in requests
            if request.image is not None
        ]
        assert len(images) in (0, len(requests)), "requests with and without an image"
        texts = [
            self.processor.apply_chat_template(
                user_turns(
                    [{"role": "user", "content": request.prompt}],
                    num_images=int(request.image is not None),
                ),
                add_generation_prompt=True,
                tokenize=False,
            )
            for request in requests
        ]
        batch = process(
            self.processor,
            texts,
            images or None,
            add_special_tokens=self._renderer.adds_special_tokens(texts[0]),
            padding_side="left",
        )
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        # the pad token may be beyond the model's embedding; any other masked token will do
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["input_ids"] = ids.where(mask != 0, ids[:, -1:])
        return batch

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]
