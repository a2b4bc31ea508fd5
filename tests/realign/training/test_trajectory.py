"""Two hundred steps of our trainer end with the weights of plain PyTorch.

Ours: packed rows, cached references, the fused head. Beside it a loop that shares nothing with it
but the model's weights: a forward a sequence, the reference live, log-softmax of all logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForImageTextToText

from realign.data.records import Record
from realign.modeling.acceleration import Numerics
from realign.modeling.collate import PreferenceCollator
from realign.modeling.loading import load_model
from realign.modeling.parts import freeze_parts
from realign.modeling.processors import load_processor
from realign.reference import Scoring, build_cache, read_cache
from realign_kernels import Objective

BETA, PAIRS = 0.1, 2
LEARNING_RATE = 1e-4  # the loss falls to a fifth in 200 steps
SEQUENCES = (("chosen", False), ("rejected", False), ("chosen", True))


class Trajectory(NamedTuple):
    """The results of every step."""

    losses: Tensor
    grad_norms: Tensor


def train(model: nn.Module, losses: Iterator[Tensor]) -> Trajectory:
    """Step once for each loss, which is computed with the weights of that moment."""
    freeze_parts(model, {"vision"})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    found: list[tuple[float, float]] = []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return Trajectory(*torch.tensor(found, dtype=torch.float64).T)


def ours(model_dir: Path, batches: Sequence[list[Record]], root: Path) -> Trajectory:
    """Compute the reference as ``realign cache`` and ``realign train`` do."""
    records = list({record.key: record for batch in batches for record in batch}.values())
    # batches of another size than those of training
    scoring = Scoring(model_dir, 3, "label", Numerics(torch.float32), batch_size=5)
    build_cache(records, scoring, root, shard_size=7)
    reference = read_cache(root, records, scoring.identity())
    collator = PreferenceCollator(load_processor(model_dir), 3, reference, shared_prefix=True)
    model = load_model(model_dir, torch.float32).train()

    def losses() -> Iterator[Tensor]:
        for batch in map(collator, batches):
            del batch["ids"]
            yield model(**batch, objective=Objective.rdpo(BETA)).loss

    return train(model, losses())


def plain(
    model_dir: Path, batches: Sequence[list[Record]], dtype: torch.dtype = torch.float32
) -> Trajectory:
    """The formula of the paper, written out."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    model.to(dtype).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    processor = load_processor(model_dir)

    def log_ratio(record: Record, answer: str, retrieved: bool) -> Tensor:
        images = record.open_images(rejected=retrieved)
        parts = [{"type": "image"}, {"type": "text", "text": record.prompt[0]["content"]}]
        reply = {"type": "text", "text": getattr(record, answer)}
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [reply]}]
        text = processor.apply_chat_template(turns)
        prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
        inputs = processor(text=text, images=images, return_tensors="pt").to(dtype)
        start = processor(text=prompt, images=images, return_tensors="pt").input_ids.shape[1]
        labels = inputs["input_ids"][0, start:, None]
        found = []
        for scorer in (model, reference):
            with torch.set_grad_enabled(scorer is model):
                logits = scorer(**inputs, use_cache=False).logits[0, start - 1 : -1]
                found.append(logits.log_softmax(-1).gather(-1, labels).sum())
        return found[0] - found[1]

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            of_pairs = []
            for record in batch:
                chosen, text, image = (log_ratio(record, *which) for which in SEQUENCES)
                of_pairs.append(
                    -logsigmoid(BETA * (chosen - text)) - logsigmoid(BETA * (chosen - image))
                )
            yield torch.stack(of_pairs).mean()

    return train(model, losses())


def assert_same_trajectory(
    model_dir: Path, make_records: Callable[..., list[Record]], root: Path, seed: int, steps: int
) -> None:
    records = make_records(24, seed)
    order = torch.randint(
        len(records), (steps, PAIRS), generator=torch.Generator().manual_seed(seed)
    )
    batches = [[records[index] for index in step] for step in order.tolist()]
    found, expected = ours(model_dir, batches, root), plain(model_dir, batches)
    assert abs(found.losses[0] - 2 * torch.tensor(2.0).log()) < 1e-6
    assert expected.losses[-steps // 4 :].mean() < 0.9 * expected.losses[0]  # something was learned
    difference = found.losses - expected.losses
    summary = f"loss max {difference.abs().max():.1e}, mean {difference.mean():.1e}"
    assert difference.abs().max() <= 1e-5, summary
    assert difference.mean().abs() <= 1e-6, summary
    norms = largest_difference(found, expected)
    if norms > 1e-4:
        # two runs in float32 drift apart by rounding alone: how far is either from float64?
        exact = plain(model_dir, batches, torch.float64)
        by_rounding = largest_difference(expected, exact)
        assert largest_difference(found, exact) <= max(1e-4, 1.5 * by_rounding), (norms, summary)
        assert norms <= 1e-3, summary


def largest_difference(found: Trajectory, expected: Trajectory) -> float:
    """Return the relative difference of the gradients' norms."""
    return float(((found.grad_norms - expected.grad_norms).abs() / expected.grad_norms).max())


def test_a_short_trajectory_equals_that_of_plain_pytorch(model_dir, records, tmp_path):
    assert_same_trajectory(model_dir, records, tmp_path, seed=0, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_hundred_steps_equal_those_of_plain_pytorch(model_dir, records, tmp_path, seed):
    assert_same_trajectory(model_dir, records, tmp_path, seed, steps=200)
