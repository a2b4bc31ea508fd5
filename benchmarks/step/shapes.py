"""Shapes of whole training steps: a model, the rows of a pair, and what token counts predict.

Letters: **L** tokens of one sequence (image, prompt and answer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SCHEMES = ("ours", "authors", "trl")
MODES = ("lora", "full")


@dataclass(frozen=True)
class StepShape:
    """A model and the pairs that it is trained on; every pair is equally long."""

    name: str
    family: str  # "llava" or "qwen2.5-vl"
    vocabulary: int
    text: dict[str, int]
    """hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads."""
    vision: dict[str, int]
    """Hidden size, layers, heads and so on, under the names of the family's configuration."""
    image_size: tuple[int, int]  # height and width in pixels
    patch_size: int  # side of one image token in pixels
    lora_rank: int
    num_images: int = 1  # per row; an any-resolution image is five tiles of 576 tokens
    prompt_tokens: int = 60
    answer_tokens: int = 120  # the end of the turn included

    @property
    def image_tokens(self) -> int:
        """Image tokens of one row."""
        height, width = self.image_size
        return self.num_images * (height // self.patch_size) * (width // self.patch_size)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of images and prompt of one row."""
        return self.image_tokens + self.prompt_tokens


class Work(NamedTuple):
    """Work of a scheme for one pair."""

    policy_tokens: int  # through the language model, with gradient
    reference_tokens: int  # the same without gradient
    encodes: int  # of images, by the vision tower


def work(scheme: str, shape: StepShape) -> Work:
    """Count what one pair costs: rDPO has three cells, whose first two share a prefix.

    - ours: ``[v, x | y_w | y_l]`` and ``[v_l, x | y_w]``; the reference is cached.
    - authors: three sequences, policy and reference; every forward encodes its images twice.
    - trl: two DPO pairs, so four sequences, policy and reference.
    """
    L = shape.prefix_tokens + shape.answer_tokens
    if scheme == "ours":
        return Work(2 * shape.prefix_tokens + 3 * shape.answer_tokens, 0, 2 * shape.num_images)
    sequences, encodes = {"authors": (3, 2), "trl": (4, 1)}[scheme]
    return Work(sequences * L, sequences * L, 2 * sequences * encodes * shape.num_images)


def predicted_ratio(
    scheme: str, shape: StepShape, mode: str, *, ours_checkpoints: bool, checkpoints: bool
) -> float:
    """Return the time of a scheme's step as a multiple of ours, predicted from token counts alone.

    The unit is one forward of one token: a backward counts 1 if the weights are frozen and 2 if
    they are trained, and recomputed activations add 1. The encoding of images, the quadratic part
    of attention and the head count nothing.
    """

    def units(of: Work, recomputes: bool) -> int:
        of_policy = (2 if mode == "lora" else 3) + recomputes
        return of.policy_tokens * of_policy + of.reference_tokens

    return units(work(scheme, shape), checkpoints) / units(work("ours", shape), ours_checkpoints)


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _clip(hidden: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_QWEN_VISION = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
_LLAVA_7B = (32064, _text(4096, 11008, 32, 32, 32), _clip(1024, 24, 16))
_QWEN_7B = (152064, _text(3584, 18944, 28, 28, 4), _QWEN_VISION)

SHAPES = {
    shape.name: shape
    for shape in (
        # to test a script; not for speed
        StepShape(
            "tiny", "llava", 300, _text(64, 128, 2, 4, 4), _clip(32, 2, 2), (28, 28), 14, 4,
            prompt_tokens=6, answer_tokens=10,
        ),
        StepShape(
            "tiny-qwen", "qwen2.5-vl", 300, _text(64, 128, 2, 4, 2),
            {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2},
            (56, 84), 28, 4, prompt_tokens=8, answer_tokens=10,
        ),
        # large enough for the blocks of kernels and of 4-bit weights, small enough for float64
        StepShape(
            "small", "llava", 1031, _text(256, 704, 4, 4, 4), _clip(64, 3, 2), (56, 56), 14, 8,
            prompt_tokens=12, answer_tokens=24,
        ),
        StepShape(
            "small-qwen", "qwen2.5-vl", 1031, _text(256, 704, 4, 4, 2),
            {"hidden_size": 64, "intermediate_size": 128, "depth": 3, "num_heads": 2},
            (112, 112), 28, 8, prompt_tokens=12, answer_tokens=24,
        ),
        # for two cores: rank and tower are in proportion to those of 7B, whose tower has 5 % of the
        # parameters of the layers; only the head is larger in proportion
        StepShape(
            "llava-64m", "llava", 32064, _text(512, 1408, 8, 8, 8), _clip(128, 7, 2),
            (336, 336), 14, 16,
        ),
        StepShape(
            "llava-102m", "llava", 32064, _text(640, 1728, 12, 10, 10), _clip(192, 7, 3),
            (336, 336), 14, 20,
        ),
        StepShape("llava-1.5-7b", "llava", *_LLAVA_7B, (336, 336), 14, 128),
        StepShape("llava-1.5-7b-5-tiles", "llava", *_LLAVA_7B, (336, 336), 14, 128, num_images=5),
        StepShape("qwen2.5-vl-7b", "qwen2.5-vl", *_QWEN_7B, (672, 672), 28, 128),
        StepShape("qwen2.5-vl-7b-2880", "qwen2.5-vl", *_QWEN_7B, (1344, 1680), 28, 128),
    )
}  # fmt: skip
