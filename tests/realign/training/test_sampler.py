"""Every pair goes to one rank once, in steps that do not depend on the number of ranks."""

from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
import torch

from realign.data.records import Record
from realign.modeling.collate import PreferenceCollator
from realign.modeling.processors import load_processor
from realign.training.sampler import FilledCollator, PairSampler, choose_filler


def ranks(num_pairs: int, batch_size: int, num_ranks: int, **options) -> list[PairSampler]:
    return [
        PairSampler(num_pairs, batch_size, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]


def filled_collator(collator: PreferenceCollator, rows: list[Record]) -> FilledCollator:
    filler = rows[choose_filler(rows)]
    return FilledCollator(collator, lambda: filler, has_images=bool(filler.images))


def cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def steps(num_pairs: int, batch_size: int, accumulation: int, num_ranks: int) -> list[list[int]]:
    """The pairs of every optimizer step, over all ranks."""
    shares = zip(*ranks(num_pairs, batch_size, num_ranks, seed=3), strict=True)
    micro_steps = [list(chain(*share)) for share in shares]
    return [list(chain(*step)) for step in cut(micro_steps, accumulation)]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_ranks"),
    [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4), (1, 1, 8)],
)
@pytest.mark.parametrize("num_pairs", [1, 7, 8, 9, 21, 29])
def test_an_optimizer_step_has_the_same_pairs_for_any_batch_size_and_ranks(
    num_pairs: int, batch_size: int, accumulation: int, num_ranks: int
) -> None:
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(3)).tolist()
    assert steps(num_pairs, batch_size, accumulation, num_ranks) == cut(order, 8)


@pytest.mark.parametrize("num_pairs", range(1, 26))
def test_ranks_have_equally_many_micro_steps_and_share_every_pair_once(num_pairs: int) -> None:
    shares = [list(sampler) for sampler in ranks(num_pairs, 2, 4)]
    assert {len(share) for share in shares} == {len(ranks(num_pairs, 2, 4)[0])}
    assert sorted(chain(*chain(*shares))) == list(range(num_pairs))
    assert max(map(len, chain(*shares))) <= 2
    for micro_step in zip(*shares, strict=True):  # even: no rank waits longer than it must
        sizes = [len(pairs) for pairs in micro_step]
        assert max(sizes) - min(sizes) <= 1


def test_every_epoch_has_a_seeded_order() -> None:
    (sampler,) = ranks(50, 4, 1, seed=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert first == again != list(sampler)
    assert list(chain(*ranks(50, 4, 1, seed=2)[0])) == list(chain(*sampler))  # seed + epoch
    assert list(chain(*ranks(5, 2, 1, shuffle=False)[0])) == list(range(5))


def test_drop_last_omits_the_last_micro_step() -> None:
    shares = [list(sampler) for sampler in ranks(11, 2, 2, drop_last=True)]
    assert [[len(pairs) for pairs in share] for share in shares] == [[2, 2], [2, 2]]
    assert len(ranks(11, 2, 2, drop_last=True)[0]) == 2


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_rank_without_pairs_or_images_collates_a_filler_batch(
    model_dir, records, shared_prefix: bool
) -> None:
    rows = records(3)
    text = [dataclasses.replace(row, images=(), rejected_images=()) for row in rows]
    collator = PreferenceCollator(load_processor(model_dir), 3, shared_prefix=shared_prefix)
    filled = filled_collator(collator, [text[0], *rows])
    assert filled([])["ids"] == []
    assert torch.equal(filled([])["input_ids"], collator([rows[0]])["input_ids"])
    assert "unseen_images" not in filled([text[1], rows[1]])
    unseen = filled(text)["unseen_images"]
    assert unseen.keys() == {"pixel_values"}
    assert torch.equal(unseen["pixel_values"][:1], collator([rows[0]])["pixel_values"][:1])
    assert filled(text)["ids"] == ["r0", "r1", "r2"]
    # no pair has an image, so there is nothing to wait for
    assert "unseen_images" not in filled_collator(collator, text)(text)
