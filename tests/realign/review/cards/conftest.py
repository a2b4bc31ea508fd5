"""A run of every stage on the embedded model, as small as can be, and a hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from realign.building.run import build
from realign.config import BuildConfig, EvalConfig, LoraSection, TrainConfig
from realign.demo.data import write_eval_data, write_training_data
from realign.demo.run import MODEL
from realign.demo.tasks import LEXICON_PATH
from realign.evaluation.run import evaluate
from realign.training.run import train
from tests.realign.review.cards.hub import TOKEN, Hub

BASE = "org/base"
BASE_CARD = "---\nlicense: other\nlicense_name: scenes\nlicense_link: LICENSE\n---\n# Base\n"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dataset/, checkpoint/ (an adapter of the language model) and eval/; beside it
    base/, the base with a card.
    """
    root = tmp_path_factory.mktemp("cards")
    shutil.copytree(MODEL, root / "base")
    (root / "base" / "README.md").write_text(BASE_CARD)
    world, run = root / "world", root / "run"
    write_training_data(world, 6, 0)
    write_eval_data(world, 3, 0)
    build(
        BuildConfig(
            source=world / "train.jsonl",
            images=world / "images",
            model=str(root / "base"),
            out=run / "dataset",
            lexicon=LEXICON_PATH,
            keep_unmasked=True,
            max_new_tokens=72,
            workers=1,
        )
    )
    train(
        TrainConfig(
            model=str(root / "base"),
            data=run / "dataset",
            out=run,
            lora=LoraSection(r=4, alpha=8),
            freeze_projector=True,
            learning_rate=1e-2,
            batch_size=4,
            pairs_per_step=4,
        )
    )
    evaluate(
        EvalConfig(
            models={"base": str(root / "base"), "aligned": str(run / "checkpoint")},
            data=world / "eval",
            images=world / "images",
            out=run / "eval",
            bootstrap=50,
        )
    )
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    folder = tmp_path / "run"
    for name in ("dataset", "checkpoint", "eval"):
        shutil.copytree(finished / name, folder / name)
    for path in finished.glob("*.json*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process may reach, with the token of its user."""
    server = Hub()
    settings = {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,  # its server speaks a protocol of its own
    }
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


def photo(folder: Path) -> Path:
    """Draw a scene into ``photo.jpg`` of a folder."""
    from realign.demo.drawing import draw
    from realign.demo.world import free_scene

    path = folder / "photo.jpg"
    draw(free_scene(Random(0))).save(path, "JPEG")
    return path
