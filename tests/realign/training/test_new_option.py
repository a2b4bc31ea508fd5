"""A new option of training touches its section and the file that uses it: two options that do not
exist are declared in a section, used in one function, and everything else follows.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from typer.testing import CliRunner

from realign import config, config_file
from realign.cli import app
from realign.config import CacheConfig, Effect, TrainConfig
from realign.config_file import load_config
from realign.data.formats.parquet import write_parquet
from realign.errors import RefusedError
from realign.modeling import loading
from realign.modeling.acceleration import Numerics
from realign.reference.run import cache
from realign.training import arguments
from realign.training.run import train
from realign.training.trainer import RDPOConfig, RDPOTrainer


class Train(TrainConfig):
    """``realign train`` with two more options."""

    loss_scale: float = 1.0
    """Factor of the loss."""
    weight_scale: Annotated[float, Effect.NUMBERS] = 1.0
    """Factor of the weights of the head."""


class Cache(CacheConfig):
    """``realign cache`` with the one that changes numbers."""

    weight_scale: Annotated[float, Effect.NUMBERS] = 1.0
    """Factor of the weights of the head."""


@dataclass
class Arguments(RDPOConfig):
    """The arguments of the trainer, in the file that uses them."""

    loss_scale: float = 1.0


@pytest.fixture
def options(monkeypatch, tmp_path: Path, model_dir: Path, records) -> dict[str, Any]:
    """Declare both options and use each in one function; return what a run requires."""
    for module in (config, config_file):
        monkeypatch.setattr(module, "SECTIONS", {**config.SECTIONS, "train": Train})
    monkeypatch.setattr(arguments, "RDPOConfig", Arguments)
    compute_loss, load = RDPOTrainer.compute_loss, Numerics.loading

    def scaled_loss(self: RDPOTrainer, *args: Any, **kwargs: Any) -> Any:
        return compute_loss(self, *args, **kwargs) * self.args.loss_scale  # type: ignore[attr-defined, operator]

    def scaled_weights(self: Numerics) -> dict[str, Any]:
        scales.append(self.more.get("weight_scale"))
        return load(self)

    scales: list[float | None] = []
    monkeypatch.setattr(RDPOTrainer, "compute_loss", scaled_loss)
    monkeypatch.setattr(loading.Numerics, "loading", scaled_weights)
    write_parquet(records(4), tmp_path / "dataset.parquet")
    return {
        "model": str(model_dir),
        "data": tmp_path / "dataset.parquet",
        "batch_size": 4,
        "pairs_per_step": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "scales": scales,
    }


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_a_new_option_is_a_flag_a_file_key_and_a_python_argument(
    tmp_path: Path, options, monkeypatch
) -> None:
    del options["scales"]
    shown = CliRunner().invoke(app, ["train", "--help"]).output
    for flag, meaning in (("--loss-scale", "Factor of the loss."), ("--weight-scale", "of the")):
        assert flag in shown
        assert meaning in shown
    file = tmp_path / "run.yaml"
    file.write_text("train: {loss_scale: 0.5}")
    given = {"model": options["model"], "data": str(options["data"]), "out": str(tmp_path / "run")}
    read = load_config(Train, file, ["train.weight_scale=2"], given)
    assert (read.loss_scale, read.weight_scale) == (0.5, 2.0)
    with pytest.raises(RefusedError, match=r"no option 'los_scale'\. Did you mean 'loss_scale'\?"):
        load_config(Train, None, ["train.los_scale=2"], given)
    asked: list[Train] = []
    monkeypatch.setattr("realign.training.run.train", lambda config, dry_run: asked.append(config))
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["train", *flags, "--loss-scale", "0.25"])
    assert result.exit_code == 0, result.output
    assert asked[0].loss_scale == 0.25


def test_new_options_reach_the_trainer_the_identity_and_the_run_folder(
    tmp_path: Path, options
) -> None:
    scales = options.pop("scales")
    plain = train(Train(**options, out=tmp_path / "plain"))
    (place,) = (tmp_path / "plain" / "cache").iterdir()
    scales.clear()
    scaled = train(Train(**options, out=tmp_path / "scaled", loss_scale=0.0, cache=place))
    assert weights(scaled) != weights(plain)  # what the trainer does
    assert scales == [1.0]  # the policy; its reference is cached, as one of the same numbers

    changed = Train(**options, out=tmp_path / "plain", weight_scale=2.0)
    with pytest.raises(RefusedError, match=r"config\.weight_scale: stored 1\.0, requested 2\.0"):
        train(changed)
    with pytest.raises(RefusedError, match=r"config\.loss_scale: stored 0\.0, requested 1\.0"):
        train(Train(**options, out=tmp_path / "scaled"))
    with pytest.raises(RefusedError, match=r"numerics\.weight_scale: cached 1\.0, needed 2\.0"):
        train(changed.model_copy(update={"out": tmp_path / "other", "cache": place}))
    shared = {"model", "data", "batch_size"}
    cached = cache(
        Cache(**{name: options[name] for name in shared}, out=tmp_path / "cache", weight_scale=2.0)
    )
    assert json.loads((cached / "identity.json").read_text())["numerics"]["weight_scale"] == 2.0
    assert scales[-1] == 2.0  # and the reference is loaded with it


def test_train_and_cache_sections_mark_the_same_numeric_options() -> None:
    def marked(section: type[Any]) -> set[str]:
        fields = section.model_fields
        return {name for name in fields if Effect.NUMBERS in fields[name].metadata}

    assert marked(TrainConfig) == marked(CacheConfig)
    assert marked(TrainConfig) == {one.name for one in dataclasses.fields(Numerics)} - {"more"}


def test_a_run_folder_of_an_older_format_is_refused_by_its_schema(tmp_path: Path, options) -> None:
    del options["scales"]
    (tmp_path / "run").mkdir()
    older = json.dumps({"config": {"beta": 0.1}, "rows": [], "processes": 1})
    (tmp_path / "run" / "train.json").write_text(older)
    with pytest.raises(RefusedError, match=r"train\.json must be of schema 2, got 1: another ver"):
        train(Train(**options, out=tmp_path / "run"))
    assert (tmp_path / "run" / "train.json").read_text() == older
