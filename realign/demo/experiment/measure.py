"""Answers of a model on an evaluation draw: captions, the log-odds of Yes in its answers, and how
far its captions are from what the base would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.data.records import Record
from realign.demo.experiment.scenes import Draw
from realign.demo.world import DESCRIBE
from realign.generation.generator import Request
from realign.generation.transformers_generator import TransformersGenerator
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.preference_forward import body_states
from realign.modeling.processors import load_processor

MAX_NEW_TOKENS = 72
BATCH_SIZE = 125
KL_BATCH_SIZE = 25
DIGITS = 4  # of log-odds and divergences in files


class Measurer:
    """Measures models that were aligned from one base.

    Args:
        base: Folder of the base.
        images: Folder of the drawn scenes.
        kl_captions: Captions of a draw whose divergence from the base is computed, from the first.
    """

    def __init__(self, base: Path, images: Path, kl_captions: int) -> None:
        self.base, self.images, self.kl_captions = base, images, kl_captions
        self.processor = load_processor(base)
        tokens = self.processor.tokenizer
        self.yes, self.no = (tokens(word).input_ids[0] for word in (" Yes", " No"))

    @cached_property
    def reference(self) -> Any:
        """The base with its weights."""
        return load_model(self.base, torch.float32).eval()

    def captions(
        self, model: Any, draw: Draw, sets: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the model's descriptions of the scenes of some sets: ``text`` and ``is_cut``."""
        generator = TransformersGenerator(model, self.processor, MAX_NEW_TOKENS, BATCH_SIZE)
        paths = draw.images(self.images)
        return {
            name: [
                {"text": answer.text, "is_cut": answer.is_cut}
                for answer in generator([Request(DESCRIBE, path) for path in paths[name]])
            ]
            for name in sets
        }

    def answers(self, model: Any, draw: Draw) -> dict[str, list[dict[str, Any]]]:
        """Return what the model says first to all questions by set: ``text``, its likeliest first
        token, and ``log_odds`` of Yes against No there.
        """
        generator = TransformersGenerator(model, self.processor, 1, BATCH_SIZE)
        paths = draw.images(self.images)
        return {
            name: self._first_tokens(
                generator, [Request(one.text, paths[name][one.scene]) for one in questions]
            )
            for name, questions in draw.questions.items()
        }

    @torch.inference_mode()
    def _first_tokens(
        self, generator: TransformersGenerator, requests: Sequence[Request]
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        # questions of one length together waste no padding
        order = sorted(range(len(requests)), key=lambda place: len(requests[place].prompt))
        for start in range(0, len(order), BATCH_SIZE):
            batch = generator.inputs([requests[at] for at in order[start : start + BATCH_SIZE]])
            logits = generator.model(**batch, logits_to_keep=1).logits[:, -1].double()
            odds = logits[:, self.yes] - logits[:, self.no]
            words = self.processor.tokenizer.batch_decode(logits.argmax(-1)[:, None])
            found += [
                {"text": word.strip(), "log_odds": round(value, DIGITS)}
                for word, value in zip(words, odds.tolist(), strict=True)
            ]
        placed = dict(zip(order, found, strict=True))
        return [placed[place] for place in range(len(requests))]

    def divergence(self, model: Any, draw: Draw, captions: Sequence[str]) -> float | None:
        """Return the mean KL divergence of the model from the base over its own captions of free
        scenes, in nats a caption; None where it wrote nothing.
        """
        paths = draw.images(self.images)["free"]
        nonempty = [(path, text) for path, text in zip(paths, captions, strict=True) if text]
        values: list[float] = []
        for start in range(0, len(nonempty[: self.kl_captions]), KL_BATCH_SIZE):
            part = nonempty[start : min(start + KL_BATCH_SIZE, self.kl_captions)]
            records = [
                Record(
                    id=path.name,
                    images=(path.read_bytes(),),
                    prompt=({"role": "user", "content": DESCRIBE},),
                    chosen=text,
                    rejected="",
                )
                for path, text in part
            ]
            values += self._divergences(model, records)
        return round(sum(values) / len(values), DIGITS) if values else None

    @torch.inference_mode()
    def _divergences(self, model: Any, records: Sequence[Record]) -> list[float]:
        batch = PreferenceCollator(self.processor, 1)(records)
        packing, images, index = (batch.pop(name) for name in ("packing", "images", "answer_index"))
        sequences = batch.pop("sequence_ids")
        for name in ("answer_labels", "num_tokens", "ids"):
            del batch[name]
        policy, reference = (
            _logits(_plain(one), batch, packing, images, index) for one in (model, self.reference)
        )
        of_tokens = kl_divergence(policy, reference)
        sums = torch.zeros(len(records), dtype=torch.float64)
        return sums.index_add(0, sequences, of_tokens).tolist()


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy, reference) of each row of logits over the vocabulary, in nats, float64.

    Args:
        policy: Logits, shape ``(N, V)``.
        reference: The same of the reference.
    """
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (policy, reference))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _plain(model: Any) -> Any:
    """Return the model that an adapter of peft is on, with the adapter working."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _logits(model: Any, batch: dict[str, Any], packing: Any, images: Any, index: Tensor) -> Tensor:
    states = body_states(model, dict(batch), packing=packing, images=images)
    return model.get_output_embeddings()(states.flatten(0, 1).index_select(0, index))
