"""The projector's own learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.errors import RefusedError
from realign.modeling.adapters import add_adapter
from realign.modeling.loading import load_model
from realign.modeling.parts import part_of
from realign.modeling.processors import load_processor
from realign.training.trainer import RDPOConfig, RDPOTrainer


def trainer(model, model_dir: Path, tmp_path: Path, rows, **options) -> RDPOTrainer:
    given = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = RDPOConfig(output_dir=str(tmp_path / "steps"), **given, **options)
    reference = {row.key: torch.zeros(3) for row in rows}
    return RDPOTrainer(model, args, rows, load_processor(model_dir), reference)


@pytest.mark.parametrize("kind", ["full", "adapter", "saved"])
def test_the_projector_has_its_own_rate_and_unchanged_weight_decay(
    tmp_path: Path, model_dir, records, kind: str
) -> None:
    model = load_model(model_dir, torch.float32)
    if kind != "full":
        model = add_adapter(
            model,
            rank=2,
            alpha=4,
            targets="all-linear",
            freeze_vision=True,
            train_projector=kind == "saved",
        )
    options = {"learning_rate": 1e-5, "weight_decay": 0.1, "warmup_steps": 2}
    ours = trainer(model, model_dir, tmp_path, records(8), projector_learning_rate=2e-5, **options)
    optimizer = ours.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = ours.get_decay_parameter_names(model)
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["lr"] == (2e-5 if part_of(name) == "projector" else 1e-5), name
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
    # every trained parameter once
    assert sorted(seen) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    # and the schedule scales each rate by itself
    ours.create_scheduler(num_training_steps=10)
    optimizer.step()
    ours.lr_scheduler.step()
    rates = {group["lr"] for group in optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.5e-5, 1e-5])


def test_default_groups_are_used_without_a_projector_rate(
    tmp_path: Path, model_dir, records
) -> None:
    ours = trainer(load_model(model_dir, torch.float32), model_dir, tmp_path, records(2))
    assert {group["lr"] for group in ours.create_optimizer().param_groups} == {5e-5}


def test_a_rate_for_a_frozen_projector_is_refused(tmp_path: Path, model_dir, records) -> None:
    ours = trainer(
        load_model(model_dir, torch.float32),
        model_dir,
        tmp_path,
        records(2),
        projector_learning_rate=2e-5,
        freeze_projector=True,
    )
    with pytest.raises(RefusedError, match=r"projector_learning_rate must be set only .*got 2e-05"):
        ours.create_optimizer()
