"""The demo's models are trained side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.config import TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.demo.experiment.pairs import make_pairs
from realign.demo.experiment.records import records
from realign.demo.models import MODELS, SHOWN, train_models
from realign.demo.run import MODEL, train_config


def test_the_shown_model_is_the_last_of_the_trained_models() -> None:
    assert MODELS[-1].name == SHOWN
    assert len({model.name for model in MODELS}) == len(MODELS)


def test_every_model_has_its_folder(tmp_path: Path) -> None:
    folders = [train_config(model, tmp_path, tmp_path, 0).out for model in MODELS]
    assert len({*folders}) == len(MODELS)
    assert folders[-1] == tmp_path


@pytest.mark.full
def test_the_number_of_processes_does_not_change_the_weights(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.parquet"
    write_parquet(records(make_pairs("shortcut", 3, 24, MODEL), "retrieved"), pairs)
    weights = {}
    for workers in (1, 2):
        configs = {
            name: TrainConfig(
                model=str(MODEL),
                data=pairs,
                out=tmp_path / str(workers) / name,
                cache=None,
                objective=name,
                batch_size=8,
                pairs_per_step=8,
                learning_rate=1e-4,
            )
            for name in ("dpo", "rdpo")
        }
        logs = tmp_path / str(workers) / "logs"
        seconds = train_models(configs, logs, workers)
        assert seconds.keys() == configs.keys()
        assert all("train:" in (logs / f"{name}.log").read_text() for name in configs)
        weights[workers] = [
            (config.out / "checkpoint" / "model.safetensors").read_bytes()
            for config in configs.values()
        ]
        assert weights[workers][0] != weights[workers][1]
    assert weights[1] == weights[2]
    # a finished run is not trained again, and keeps the seconds of its training
    assert train_models(configs, logs, 1) == seconds
