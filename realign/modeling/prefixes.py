"""Prefixes of answers: prompts with their images. Equal prefixes are processed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realign.modeling.families import ANSWER_TOKEN_TYPE, image_token_id, process
from realign.modeling.image_features import ImageUse


@dataclass(frozen=True, slots=True)
class Prefix:
    """A templated prompt and the bytes of its image files."""

    text: str
    images: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Processed prefixes.

    Attributes:
        tokens: ``input_ids`` and the model's other inputs per token, ``(length,)``, by prefix.
        image_inputs: The processor's tensors of the distinct sets of images.
        sets: Index of each set of images.
        set_tokens: Number of image tokens of each set.
        answer_type: Token type of answers.
    """

    tokens: Mapping[Prefix, Mapping[str, Tensor]]
    image_inputs: Mapping[str, Tensor]
    sets: Mapping[tuple[bytes, ...], int]
    set_tokens: tuple[int, ...]
    answer_type: int

    def length(self, prefix: Prefix) -> int:
        """Return the number of tokens of a prefix, image tokens included."""
        return len(self.tokens[prefix]["input_ids"])

    def with_answers(self, prefix: Prefix, answers: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return the tokens of a prefix and of the answers that follow it, concatenated."""
        row = {}
        for name, values in self.tokens[prefix].items():
            after = [token for answer in answers for token in answer]
            if name != "input_ids":
                after = [self.answer_type] * len(after)
            row[name] = torch.cat([values, torch.tensor(after, dtype=values.dtype)])
        return row

    def use(self, rows: Sequence[Prefix]) -> ImageUse | None:
        """Return the images that the rows show, one prefix per row; None without images."""
        if not self.sets:
            return None
        shown = tuple(self.sets[prefix.images] for prefix in rows if prefix.images)
        return ImageUse(self.set_tokens, tuple(len(images) for images in self.sets), shown)


def encode_prefixes(
    processor: Any,
    prefixes: Mapping[Prefix, Callable[[], list[Image.Image]]],
    *,
    add_special_tokens: bool,
) -> Prefixes:
    """Process prefixes.

    Args:
        processor: The model's processor.
        prefixes: Prefixes, each with a function that decodes its images.
        add_special_tokens: Whether the tokenizer adds its own special tokens.
    """
    sets: dict[tuple[bytes, ...], int] = {}
    # the first prefix with a set of images, later ones with the same set, and those without images
    first, later, without = [], [], []
    for prefix in prefixes:
        if not prefix.images:
            without.append(prefix)
        elif prefix.images in sets:
            later.append(prefix)
        else:
            sets[prefix.images] = len(sets)
            first.append(prefix)
    tokens: dict[Prefix, Mapping[str, Tensor]] = {}
    image_inputs: Mapping[str, Tensor] = {}
    for group in (first, later, without):
        if not group:
            continue
        inputs = process(
            processor,
            [prefix.text for prefix in group],
            None if group is without else [prefixes[prefix]() for prefix in group],
            add_special_tokens=add_special_tokens,
        )
        lengths = (inputs.pop("attention_mask") != 0).sum(dim=1).tolist()
        by_token = {
            name: inputs.pop(name)
            for name in list(inputs)
            if name == "input_ids" or name.endswith("token_type_ids")
        }
        for index, (prefix, length) in enumerate(zip(group, lengths, strict=True)):
            tokens[prefix] = {name: values[index, :length] for name, values in by_token.items()}
        if group is first:
            image_inputs = inputs
    token = image_token_id(processor)
    return Prefixes(
        tokens,
        image_inputs,
        sets,
        tuple(tokens[prefix]["input_ids"].tolist().count(token) for prefix in first),
        ANSWER_TOKEN_TYPE.get(type(processor).__name__, 0),
    )
